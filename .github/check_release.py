"""Refuses a tag that is not the version, or a version that the changelog lacks.

python .github/check_release.py v0.1.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check(tag: str, root: Path = ROOT) -> None:
    """Raises SystemExit unless the tag may be released."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = project["version"]
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, but pyproject.toml has version {version}")
    changes = (root / "CHANGELOG.md").read_text()
    if not re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.M
    ):
        raise SystemExit(
            f"CHANGELOG.md has no section '## {version} (year-month-day)', the date of "
            "the release"
        )


if __name__ == "__main__":
    check(sys.argv[1])
