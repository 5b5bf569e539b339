"""The clients benchmark: its suites against a real server, and what it reports when a check fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.clients.checklist import Target
from bench.clients.run import run_suite, suite_names, summary
from cluster.config.settings import ServingConfig
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("clients")
    make_checkpoint(folder / "base")
    make_adapter(folder / "adapter", folder / "base", rank=3)
    with serve_bases(folder, folder, ServingConfig(memory_bytes=16 << 20), ("base",)) as served:
        assert served.post(
            "/v1/load_lora_adapter", lora_name="org/adapter", lora_path=str(folder / "adapter")
        ).is_success
        yield served


def run(name: str, server: Server) -> dict[str, str | None]:
    records = run_suite(name, Path(sys.executable), Target(server.url, "base", "org/adapter"))
    return {str(record["check"]): record["error"] for record in records}


def test_a_check_passes_or_says_why_it_fails(server: Server):
    results = run("plain_http", server)
    assert results["events_end_with_done"] is None
    assert results["a_browser_may_ask"], "this server allows no other origins"
    assert "400" in results["a_browser_may_ask"] or "405" in results["a_browser_may_ask"]


def test_the_openai_package_works(server: Server):
    results = run("openai_sdk", server)
    completions = {name for name in results if name.startswith(("completion", "models", "logprobs", "stop"))}
    assert len(completions) >= 8
    assert {name: results[name] for name in completions} == dict.fromkeys(completions)


def test_a_client_that_is_not_installed_is_a_failed_check(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    target = Target("http://127.0.0.1:9", "base", "adapter")
    [record] = run_suite("openai_sdk", tmp_path / "venv" / "bin" / "python", target)
    assert "openai" in str(record["error"])
    assert summary([record])["failures"] == [record]


def test_each_suite_has_checks():
    for name in suite_names():
        text = (Path("bench/clients/suites") / f"{name}.py").read_text()
        assert text.count("\n@check\n") >= 1, name
        assert 'if __name__ == "__main__":' in text
