"""What a plain installation lacks, said before a command needs it."""

from importlib.util import find_spec

from params.errors import UserError


def require_extras(*modules: str) -> None:
    """UserError naming those of the modules that are not installed; imports none of them."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f"not installed here: {', '.join(missing)}. Install them: pip install 'inft[trl,hf,peft]'.")
