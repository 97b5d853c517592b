"""The command line, the run folder that it keeps between commands, and the demo.

In: arguments. Out: text for people or one JSON object, and an exit status.
"""
