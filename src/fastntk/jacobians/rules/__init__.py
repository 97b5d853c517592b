"""Per-sample copies of tuned parameters: ``calls`` says which functional calls are given them, ``functions`` what their
backward passes do."""
