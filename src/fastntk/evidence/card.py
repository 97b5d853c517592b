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
    entries = memory.requests()
    answered = [each for each in entries if each.kind in ("forget", "remember")]
    refreshes = [each for each in entries if each.kind == "refresh"]
    samples = dict.fromkeys(("forget", "remember"), 0)
    for each in answered:
        samples[each.kind] += int(str(each.certificate["samples"]))
    requests = Counter(each.kind for each in answered)
    verdicts = Counter(str(each.certificate["verdict"]) for each in answered)
    judged = ", ".join(f"{verdict} ({count})" for verdict, count in verdicts.most_common()) or "none yet"
    gains = [gain, *(each.certificate.get("gain") for each in refreshes)]
    ends = [f"the step was multiplied by {each:.2f}" for each in gains if isinstance(each, float)]
    headed = exact_head or any(each.certificate.get("exact_head") for each in refreshes)
    ends += ["the head was solved anew"] if headed else []
    finishing = f" Then {' and '.join(ends)}, which is measured only." if ends else ""
    audit, since = memory.audit, " since the latest refresh" if refreshes else ""
    audited = f"An audit {'passed' if audit.passed else 'FAILED'}: {audit}." if audit else f"There was no audit{since}."
    if memory.state.core is not None:
        how = "the weights are those that the same fit, from a core that is not forgotten, gives on what stays."
    else:
        how = f"each request was answered by the exact step of the network's linearisation.{finishing} "
        how += f"How far the network itself follows is measured, not proved. {audited}"
    today = datetime.now(timezone.utc).date().isoformat()
    return f"""
# A classifier from which training images were forgotten

| | requests | images |
|---|---|---|
| forgotten | {requests["forget"]} | {samples["forget"]} |
| remembered | {requests["remember"]} | {samples["remember"]} |
| left in the model | | {len(memory.ids)} |

Written on {today} by fastntk {version("fastntk")}. Nothing was retrained: {how} Verdicts: {judged}.

Weights from before the requests, wherever copies are kept, know what they knew.
"""
