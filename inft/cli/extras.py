"""What a plain installation lacks, said before a command needs it."""

from importlib.util import find_spec

from params.errors import UserError

SCORING = ("sacrebleu", "pycocoevalcap", "jieba", "MeCab", "unidic_lite")  # of the extra `eval`: what scores captions
# Of the extra `client`: the training client and its service.
CLIENT = ("fastapi", "uvicorn", "httpx", "opacus", "peft", "accelerate")


def require_extras(*modules: str) -> None:
    """UserError naming those of the modules that are not installed; imports none of them."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        extras = ["eval"] * any(name in SCORING for name in missing)
        if any(name not in SCORING for name in missing):
            extras.insert(0, "trl,hf,peft")
        raise UserError(
            f"not installed here: {', '.join(missing)}. Install them: pip install 'inft[{','.join(extras)}]'."
        )


def require_client() -> None:
    """UserError naming what of the extra `client` is not installed; imports none of it."""
    missing = [name for name in CLIENT if find_spec(name) is None]
    if missing:
        raise UserError(f"not installed here: {', '.join(missing)}. Install them: pip install 'inft[client]'.")
