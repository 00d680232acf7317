import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common import doctor, pins, threads

HEALTHY = {
    "torch": (
        "def get_num_threads(): return 3\n"
        "class version: cuda = None\n"
        "class cuda:\n"
        "    is_available = staticmethod(lambda: False)\n"
        "    device_count = staticmethod(lambda: 0)\n"
    ),
    "torchaudio": "import torch\n",
    "soundfile": "print('{\"not\": \"an answer\"}'); print('noise')\n",
    "fairseq": "import torch\n",
}


def diagnose(folder, repo_root, modules=None, dists=None, flags=(), python_flags=(), **env):
    """Run the command with fake packages in front of the real ones; (exit code, broken lines)."""
    for name, code in (HEALTHY | (modules or {})).items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    for name, version in (dists or {}).items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done = subprocess.run(
        [sys.executable, *python_flags, "-m", "ext_common.doctor", *flags],
        capture_output=True,
        text=True,
        cwd=repo_root,
        env={k: v for k, v in os.environ.items() if k not in threads.WAITING}
        | {"PYTHONPATH": str(folder), **env},
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    return done.returncode, [line for line in lines if line.startswith("broken")], lines


def test_healthy_environment(tmp_path, repo_root):
    code, broken, lines = diagnose(
        tmp_path, repo_root, OMP_NUM_THREADS="5", OMP_WAIT_POLICY="active"
    )
    assert (code, broken) == (0, [])
    assert lines[-1] == "healthy"
    text = "\n".join(lines)
    assert "ok      OMP_NUM_THREADS 5, OMP_WAIT_POLICY=active" in lines
    assert "OMP_NUM_THREADS 5" in text and "3 threads, built for CPU only" in text
    for name in ("ve-fairseq", "torch", "torchaudio", "hydra-core", "omegaconf", "numpy"):
        assert any(line.startswith(f"ok      {name} ") for line in lines)
    # fairseq comes from our fake folder, not from where ve-fairseq is installed
    assert any(line.startswith("note") and str(tmp_path) in line for line in lines)


def test_torch_that_raises_at_import(tmp_path, repo_root):
    modules = {"torch": "raise ImportError('libcudart.so.13: cannot open shared object file')"}
    code, broken, _ = diagnose(tmp_path, repo_root, modules)
    assert code == 1
    assert broken[0].startswith("broken  import torch fails: pip install --force-reinstall 'torch")
    assert "libcudart.so.13" in broken[0]


def test_torch_that_kills_the_process(tmp_path, repo_root):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    code, broken, lines = diagnose(tmp_path, repo_root, {"torch": crash})
    assert code == 1
    assert "import torch fails" in broken[0] and "signal 11" in broken[0]
    # What does not need torch is still looked at.
    assert "ok      import soundfile works" in lines
    assert [line.split()[2] for line in broken] == ["torch", "torchaudio", "fairseq"]


def test_cuda_mismatch_of_torch_and_torchaudio(tmp_path, repo_root):
    modules = {
        "torchaudio": "raise RuntimeError('Detected that PyTorch and TorchAudio were compiled with"
        " different CUDA versions. PyTorch has CUDA version 13.2 whereas TorchAudio 13.0.')"
    }
    code, broken, _ = diagnose(tmp_path, repo_root, modules, {"torch": "2.15.0"})
    assert code == 1 and len(broken) == 2
    assert broken[0].startswith("broken  torch 2.15.0 is outside >=2.9,<2.15 (")
    assert broken[0].endswith(": pip install 'torch>=2.9,<2.15'")
    assert "different CUDA versions: pip install 'torch>=2.9,<2.15'" in broken[1]


def test_pins_and_the_official_fairseq(tmp_path, repo_root):
    dists = {"hydra-core": "1.4.0", "omegaconf": "2.0.6", "fairseq": "0.12.2"}
    modules = {"fairseq": "raise ValueError('mutable default <class X> for field common')"}
    code, broken, lines = diagnose(tmp_path, repo_root, modules, dists, ["--quiet"])
    assert code == 1 and lines == broken
    assert [line for line in broken if "hydra-core 1.4.0 is outside" in line]
    assert [line for line in broken if "omegaconf 2.0.6 is outside" in line]
    official = [line for line in broken if "official fairseq 0.12.2" in line]
    assert "pip uninstall -y fairseq; pip install --force-reinstall" in official[0]
    assert "does not run on Python 3.11: pip uninstall -y fairseq" in broken[-1]


def test_works_without_any_package(tmp_path, repo_root):
    code, broken, _ = diagnose(tmp_path, repo_root, python_flags=["-S"])
    assert code == 1
    _, required, _ = pins.requirements()
    assert broken == [
        f"broken  {pin.name} is not installed: pip install {pin}" for pin in required.values()
    ]


def test_fairseq_that_cannot_be_found(monkeypatch):
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    (finding,) = doctor.which_fairseq({})
    assert finding == ("broken", "fairseq cannot be found: pip install 've-fairseq'")


def test_importing_it_imports_nothing_from_outside(repo_root):
    code = (
        "import sys, ext_common.doctor\n"
        "print({m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)"
        " - {'__main__', 'ext_common'})"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=repo_root
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_python_outside_the_range(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.1")
    (finding,) = doctor.check_python(">=3.11,<3.13")
    assert finding.level == "broken" and "3.13.1 is outside >=3.11,<3.13" in finding.text


def test_unsafe_loading_is_noted(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (finding,) = doctor.environment()
    assert finding.level == "note" and "any code" in finding.text


def test_pins_are_those_of_setup_cfg():
    python, required, source = pins.requirements()
    assert source.endswith("setup.cfg") and python == ">=3.11,<3.13"
    assert required["torch"].specifier == ">=2.9,<2.15"
    assert "pytest" not in required


def test_pins_from_metadata_lines():
    lines = ["torch<2.15,>=2.9", "tqdm", "numpy (>=1.26)", 'pytest>=8; extra == "test"', "# x"]
    assert pins.parse_pins(lines) == {
        "torch": pins.Pin("torch", "<2.15,>=2.9"),
        "tqdm": pins.Pin("tqdm", ""),
        "numpy": pins.Pin("numpy", ">=1.26"),
    }


version = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda v: ".".join(map(str, v)))


@given(version, version, st.sampled_from([">=", "<=", ">", "<", "==", "!="]))
def test_satisfies_agrees_with_packaging(have, limit, operator):
    specifiers = pytest.importorskip("packaging.specifiers")
    expected = specifiers.SpecifierSet(operator + limit).contains(have)
    assert pins.satisfies(have, operator + limit) == expected


def test_satisfies_local_versions_and_prereleases():
    assert pins.satisfies("2.14.1+cu130", ">=2.9,<2.15")
    assert not pins.satisfies("2.15.0rc1", ">=2.9,<2.15")
    assert not pins.satisfies("2.10.0", ">=2.9,<2.10")
