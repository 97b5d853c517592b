"""What a model's card says of what was forgotten: in counts."""

from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version

from fastntk.memory.memory import Memory


def card(memory: Memory, gain: float | None, exact_head: bool) -> str:
    """In Markdown, for people who are given the weights: how many samples and requests, how the answers were judged,
    and what that means. It names no sample, and no date but today's.

    Args:
        memory: kept in a folder.
        gain: by which the step was multiplied, or None.
        exact_head: whether the head was solved anew.
    """
    answered = [each for each in memory.requests() if each.kind in ("forget", "remember")]
    samples = dict.fromkeys(("forget", "remember"), 0)
    for each in answered:
        samples[each.kind] += int(str(each.certificate["samples"]))
    requests = Counter(each.kind for each in answered)
    verdicts = Counter(str(each.certificate["verdict"]) for each in answered)
    judged = ", ".join(f"{verdict} ({count})" for verdict, count in verdicts.most_common()) or "none yet"
    ends = [] if gain is None else [f"the step was multiplied by {gain:.2f}"]
    ends += ["the head was solved anew"] if exact_head else []
    finishing = f" Then {' and '.join(ends)}, which is measured only." if ends else ""
    audit = memory.audit
    audited = f"An audit {'passed' if audit.passed else 'FAILED'}: {audit}." if audit else "There was no audit."
    today = datetime.now(timezone.utc).date().isoformat()
    return f"""
# A classifier from which training images were forgotten

| | requests | images |
|---|---|---|
| forgotten | {requests["forget"]} | {samples["forget"]} |
| remembered | {requests["remember"]} | {samples["remember"]} |
| left in the model | | {len(memory.ids)} |

Written on {today} by fastntk {version("fastntk")}. Nothing was retrained: each request was answered by the exact step
of the network's linearisation, as if the images had never been there.{finishing} How far the network itself follows is
measured, not proved. Verdicts: {judged}. {audited}

Weights from before the requests, wherever copies are kept, know what they knew.
"""
