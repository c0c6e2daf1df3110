"""mmfree-bench engine counts every token of every request, and says what is wrong with a flag."""

import json
import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*arguments], capture_output=True, text=True, timeout=120, check=False)


def main(bench: str, model: str) -> None:
    # More requests than are taken at a time, and fewer tokens a step than requests at a time.
    done = run(bench, "engine", f"--model={model}", "--batch=5", "--requests=13", "--tokens=7",
               "--max_tokens=3", "--step_token_budget=4", "--threads=1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["requests"] == 13, report
    assert report["tokens"] == 13 * 3, report
    assert report["tokens_per_s"] > 0, report

    for arguments, message in (
        ([], "--model"),
        (["--model=/nowhere"], "/nowhere"),
        ([f"--model={model}", "--max_tokens=0"], "--max_tokens"),
        ([f"--model={model}", "--requests=-1"], "--requests"),
        ([f"--model={model}", "--step_token_budget=0"], "--step_token_budget"),
    ):
        failed = run(bench, "engine", *arguments)
        assert failed.returncode == 1, (arguments, failed)
        assert message in failed.stderr, (arguments, failed.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
