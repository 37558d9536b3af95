"""The package as a whole: what importing it costs, what it needs, and its names."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import craft


def test_without_trl_its_trainer_alone_is_missing_and_says_what_to_install():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import craft\n"
        "from craft import CRAFTTrainerMixin\n"
        "craft.CRAFTSFTTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "ImportError: CRAFTSFTTrainer needs trl.SFTTrainer of TRL 1.16 or newer: pip install 'trl>=1.16'."
    assert done.stderr.strip().splitlines()[-1] == told


def test_the_version_is_that_of_the_distribution():
    assert craft.__version__ == version("inft")


def test_importing_craft_or_a_name_of_it_stays_light():
    code = (
        "import json, sys, craft\n"
        "names = dir(craft)\n"
        "from craft import CRAFT_PRESETS, get_preset, CRAFTConfigMixin\n"
        "CRAFTConfigMixin(); print(json.dumps([sorted({'torch', 'trl', 'transformers'} & set(sys.modules)), names]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, names = json.loads(done.stdout)
    assert heavy == []
    assert set(craft.__all__) <= set(names)


def test_every_public_name_is_there():
    assert all(getattr(craft, name) is not None for name in craft.__all__)
    with pytest.raises(AttributeError, match="CRAFTOtherConfig"):
        _ = craft.CRAFTOtherConfig


def test_without_trls_experimental_module_orpo_alone_is_missing():
    code = (
        "import sys; sys.modules['trl.experimental.orpo'] = None\n"
        "import craft\n"
        "craft.CRAFTDPOTrainer, craft.CRAFTDPOConfig\n"
        "for name in ('CRAFTORPOConfig', 'CRAFTORPOTrainer'):\n"
        "    try: getattr(craft, name)\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "CRAFTORPOConfig needs trl.experimental.orpo.ORPOConfig of TRL 1.16 or newer: pip install 'trl>=1.16'.",
        "CRAFTORPOTrainer needs trl.experimental.orpo.ORPOTrainer of TRL 1.16 or newer: pip install 'trl>=1.16'.",
    ], done.stderr


@pytest.mark.parametrize("name", ["SFT", "DPO", "ORPO", "GRPO", "PPO", "RLOO", "KTO", "Reward"])
def test_every_config_is_made_from_a_preset_and_by_auto(name, tmp_path):
    config = getattr(craft, f"CRAFT{name}Config")
    here = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert config.from_preset("memory_efficient", **here).craft_projection_dim == 128
    assert config.auto(available_memory_gb=12, **here).craft_gradcache_chunk_size == 2
    with pytest.raises(ValueError, match="craft_alpha"):
        config(**here, craft_alpha=1.5)
