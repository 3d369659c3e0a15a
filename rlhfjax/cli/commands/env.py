"""`rlhfjax env`."""

import json

from rlhfjax.cli.arguments import Env
from rlhfjax.cli.environment import environment


def run(_: Env) -> None:
    """Prints the environment."""
    print(json.dumps(environment(), indent=2))
