"""`grpo validate`, `grpo crd`, `grpo docs`: what can be said of a document without running it."""

import argparse

from grpo_worker.config import load_job, resolved_document
from grpo_worker.config.yaml_text import yaml_text


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this module's commands."""
    validate = commands.add_parser(
        "validate",
        help="check a GRPOJob",
        description="Print `valid` and the document with every value resolved, or every error; exit code 64.",
    )
    add_document(validate)
    validate.set_defaults(function=_validate)
    crd = commands.add_parser("crd", help="print the CustomResourceDefinition")
    crd.set_defaults(function=_crd)
    docs = commands.add_parser("docs", help="print a reference (Markdown)")
    docs.add_argument(
        "of", nargs="?", choices=["configuration", "metrics"], default="configuration", help="default: configuration"
    )
    docs.set_defaults(function=_docs)


def add_document(parser: argparse.ArgumentParser) -> None:
    """The arguments `file` and `--set` (`overrides`), as `load_job` takes them."""
    parser.add_argument("file", help="the GRPOJob (YAML)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a field, e.g. actor.optim.lr=1e-5",
    )


def _validate(options: argparse.Namespace) -> None:
    job = load_job(options.file, options.overrides)
    print("valid")
    print(yaml_text(resolved_document(job)), end="")


def _crd(options: argparse.Namespace) -> None:
    from grpo_worker.config.crd import crd_yaml

    print(crd_yaml(), end="")


def _docs(options: argparse.Namespace) -> None:
    from grpo_worker import catalogue
    from grpo_worker.config.reference import reference_markdown

    print(catalogue.reference() if options.of == "metrics" else reference_markdown(), end="")
