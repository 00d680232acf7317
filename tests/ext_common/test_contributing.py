"""CONTRIBUTING.md: the part in 20 lines works as it stands there."""

import re

from diffusion_ext import weightings


def test_the_part_in_twenty_lines_works(repo_root, monkeypatch):
    text = (repo_root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(part.splitlines() + test.splitlines()) <= 20
    for name in ("_entries", "_options"):  # of the registry, as they were
        entries = getattr(weightings.WEIGHTINGS, name)
        monkeypatch.setattr(weightings.WEIGHTINGS, name, dict(entries))
    module = dict(vars(weightings))
    exec(part, module)
    exec(test, module)
    (run,) = (module[name] for name in module if name.startswith("test_"))
    run()
