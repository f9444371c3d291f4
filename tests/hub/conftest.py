"""What several files of this folder ask for."""

import shutil

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import CommitOperationAdd, ModelCard, RepoUrl


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local stand-in for the Hub: what is committed lies in `tmp_path / "repo"`."""
    repo = tmp_path / "repo"
    repo.mkdir()

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            target = repo / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("# test\n"))
    return repo
