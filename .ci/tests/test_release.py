"""Is the release what it says it is?"""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def check():
    path = ROOT / ".github" / "check_release.py"
    spec = importlib.util.spec_from_file_location("check_release", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.0 (2026-11-21)\n")
    return tmp_path


def test_tag_and_version_agree(check, project):
    check("v1.2.0", project)
    for tag in ("v1.2.1", "1.2.0", "v1.2.0rc1"):
        with pytest.raises(
            SystemExit, match=rf"the tag is {tag}, but .* version 1.2.0"
        ):
            check(tag, project)


@pytest.mark.parametrize("section", ["1.2.0 (unreleased)", "1.2.0", "1x2x0 (2026-1-1)"])
def test_a_release_is_dated(check, project, section):
    (project / "CHANGELOG.md").write_text(f"# Changes\n\n## {section}\n")
    with pytest.raises(SystemExit, match=r"no section '## 1.2.0 \(year-month-day\)'"):
        check("v1.2.0", project)


def test_of_this_project_it_reads_the_version(check):
    with pytest.raises(SystemExit, match=f"has version {PROJECT['version']}"):
        check("v0.0.0")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned(path):
    used = re.findall(r"^ *(?:- )?uses: (.*)$", path.read_text(), re.MULTILINE)
    assert used
    for action in used:
        local = action == "./.github/workflows/tests.yml"
        assert local or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_every_part_of_ci_is_a_job():
    script = (ROOT / ".ci/run").read_text()
    every, beside = (
        x.split() for x in re.findall(r"for name in (.*); do part", script)
    )
    release, jobs = (
        {name.strip('" ') for name in re.search(r"part: \[(.*)\]", text)[1].split(",")}
        for text in (path.read_text() for path in WORKFLOWS[-2:])
    )
    assert {*every} - {"newest"} <= jobs  # which is a version
    assert {*beside} == release
    tested = {name for name in jobs if name.startswith("3.")}
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested == set(claimed)
    assert PROJECT["requires-python"] == f">={min(claimed, key=lambda x: int(x[2:]))}"


def test_the_paper_is_cited():
    text = (ROOT / "CITATION.cff").read_text()
    for part in ("cff-version", "NLPCC 2023", "arXiv:1910.12249", "start: 361"):
        assert part in text
    assert "\nversion:" not in text  # stands in pyproject.toml alone
