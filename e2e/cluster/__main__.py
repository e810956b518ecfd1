"""`python -m e2e.cluster build|up|down|purge|image|control-plane`."""

import argparse
import signal
import sys
from pathlib import Path

from . import images, node
from .build import build, say
from .control_plane import ControlPlane
from .errors import ClusterError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it did what it says."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="build what the cache lacks of the binaries")
    building.add_argument("names", nargs="*", help="only these")
    commands.add_parser("up", help="start the one-node cluster")
    commands.add_parser("down", help="end it and remove all that it made; images stay in the cache")
    commands.add_parser("purge", help="down, and forget the images too")
    imaging = commands.add_parser("image", help="build a Dockerfile and load it into the node, as localhost/NAME:e2e")
    imaging.add_argument("dockerfile", type=Path)
    imaging.add_argument("name")
    imaging.add_argument("--context", type=Path, default=Path())
    imaging.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE", help="BASE_IMAGE is given")
    plane = commands.add_parser("control-plane", help="an API server alone, until Ctrl-C")
    plane.add_argument("--scheduler", action="store_true")
    options = parser.parse_args(arguments)
    # A polite kill undoes a half-made node as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        match options.command:
            case "build":
                print(build(options.names or None))
            case "up":
                print(f"export KUBECONFIG={node.up().kubeconfig}")
            case "down":
                node.down()
            case "purge":
                node.purge()
            case "image":
                build_arguments = dict(each.split("=", 1) for each in options.build_arg)
                build_arguments.setdefault("BASE_IMAGE", images.base_image())
                print(images.build_image(options.dockerfile, options.name, options.context, build_arguments))
                running = node.running()
                if running is not None:
                    images.load_image(running, options.name)
            case "control-plane":
                with ControlPlane(scheduler=options.scheduler) as api:
                    print(f"export KUBECONFIG={api.kubeconfig}", flush=True)
                    signal.pause()
    except ClusterError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
