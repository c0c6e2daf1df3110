#!/usr/bin/env python3
"""Sums up a JUnit report of ctest: counts, what failed, what was skipped and why.

Exits with 1 when a test failed or none passed.
"""

import collections
import re
import sys
import xml.etree.ElementTree as ElementTree


def skip_reason(output):
    """The words a skipped test left: those of GTEST_SKIP, or the line that begins with SKIPPED."""
    match = re.search(r": Skipped\n(.*?)\n+\[  SKIPPED \]", output, re.DOTALL)
    if match and match.group(1).strip():
        return " ".join(match.group(1).split())
    match = re.search(r"^SKIPPED:? *(.+)$", output, re.MULTILINE)
    return match.group(1).strip() if match else "no reason given"


def some_of(names, most=3):
    """The first names, without gtest's dump of their parameters, and how many more there are."""
    names = [name.split("  # ")[0] for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    passed, failed, skipped = [], [], collections.defaultdict(list)
    for case in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
        name, status = case.get("name"), case.get("status")
        if status == "run":
            passed.append(name)
        elif case.find("skipped") is not None or status in ("notrun", "disabled"):
            output = case.findtext("system-out") or ""
            reason = "disabled" if status == "disabled" else skip_reason(output)
            skipped[reason].append(name)
        else:
            failed.append(name)

    print(f"\n{len(passed)} tests passed, {len(failed)} failed, "
          f"{sum(map(len, skipped.values()))} skipped.")
    for reason, names in skipped.items():
        print(f"  skipped ({reason}): {some_of(names)}")
    for name in failed:
        print(f"  FAILED: {name}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
