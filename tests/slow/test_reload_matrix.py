"""Every preset, family and number format, tied or not, sharded or not, loaded in fresh processes: the same logits."""

import pytest

from builders.reload import matrix, run_worker, unlike, write_case


pytestmark = pytest.mark.slow


def all_jobs(root) -> tuple[list[dict], dict]:
    """Each checkpoint loaded whole, as a base model and from disk; what each must report."""
    jobs, expected = [], {}
    for case in matrix():
        one, expected[case.name] = write_case(case, root)
        jobs.append(one)
        jobs.append({**one, "name": f"base:{case.name}", "how": "base"})
        jobs.append({**one, "name": f"disk:{case.name}", "how": "disk", "offload": str(root / "offload" / case.name)})
    return jobs, expected


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Jobs and expectations."""
    return all_jobs(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("with_package", [True, False], ids=["package", "remote"])
def test_the_whole_matrix(written, with_package, tmp_path):
    jobs, expected = written
    found = run_worker(jobs, tmp_path / "work", with_package, timeout=3000)
    wrong = {}
    for name in (job["name"] for job in jobs):
        result, case = found[name], expected[name.split(":")[-1]]
        if "exception" in result:
            wrong[name] = result["exception"][-600:]
        elif not result["model"]["same"] or result["model"]["info"]:
            wrong[name] = (result["model"]["difference"], result["model"]["info"])
        elif "base:" not in name and unlike(result["model"], case, ("generation", "config")):
            wrong[name] = unlike(result["model"], case, ("generation", "config"))
        elif result["processor"]["different"] or unlike(
            result["processor"], case, ("chat", "image_tokens", "settings")
        ):
            wrong[name] = result["processor"]["different"]
    assert not wrong, f"{len(wrong)} of {len(jobs)} differ: {dict(list(wrong.items())[:3])}"
