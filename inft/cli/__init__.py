"""The command line: one command per file, each found by name in COMMANDS and imported when it is used."""

COMMANDS = {
    "train": "inft.cli.train:app",
    "caption": "inft.cli.caption:app",
    "evaluate": "inft.cli.evaluate:app",
    "report": "inft.cli.report:app",
    "merge": "inft.cli.merge:app",
    "inspect": "inft.cli.inspect:app",
    "pretrain": "inft.cli.pretrain:app",
    "finetune-encoder": "inft.cli.finetune_encoder:app",
    "preprocess": "inft.cli.preprocess:app",
    "embed": "inft.cli.embed:app",
    "evaluate-encoder": "inft.cli.evaluate_encoder:app",
    "list-models": "inft.cli.list_models:app",
    "list-modules": "inft.cli.list_modules:app",
    "list-params": "inft.cli.list_params:app",
    "logs": "inft.cli.logs:app",
    "serve": "inft.cli.serve:app",
    "audit": "inft.cli.audit:app",
}

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C, as shells have it
