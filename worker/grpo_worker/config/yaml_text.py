"""YAML that we write, so that every reader of YAML takes it as we mean it.

Invariant: a key or value that some reader takes for something else is quoted. kubectl reads YAML 1.1, where a plain `n` is false: a
plain `n: 8` in a file for kubectl arrives as `"false": 8`.
"""

import re
from typing import Any

import yaml

# A number of YAML 1.2 that YAML 1.1 reads as text: `1e-6`.
EXPONENT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Every reader takes aliases, people do not."""
        return True


_Dumper.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^[yYnN]$"), list("yYnN"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?0o[0-7]+$"), list("-+0"))


def yaml_text(document: Any, width: int = 120) -> str:
    """The document as YAML, keys in their own order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=width, allow_unicode=True)
