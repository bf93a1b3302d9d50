"""The HTTP application on Ray Serve: replicas that scale, each with its own model process.

``serve run trainkit.serve.ray_app:app bundle=/models/topics``. Needs the extra ``[ray]``. Every
replica builds its application when it starts, from a folder that its machine can read. Several
models are several Ray applications, each with its ``route_prefix`` and its own scale.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from starlette.applications import Starlette

from trainkit.serve.errors import InputError
from trainkit.serve.http import auth
from trainkit.serve.http.app import application
from trainkit.serve.http.exceptions import UnavailableError
from trainkit.serve.http.model import Models
from trainkit.serve.http.settings import Settings

STOP_S = 5.0  # for the model process to end, after the last request


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of ``app``: ``key=value`` on the command line, or ``args`` of a config file."""

    bundle: str
    name: str = ""  # of the model; empty: the last part of the folder
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 32.0  # in flight in a replica, on average, before another is started
    max_requests: int = 256  # in flight in a replica; further ones wait in Ray's proxy
    cpus: int = 1  # of a replica: Ray reserves them, and the model has as many threads
    settings: Settings = Settings()


@serve.ingress()
class Replica:
    """One model behind the application.

    The token is the replica's environment variable ``TRAINKIT_TOKEN``, if it has one: arguments are
    there for all to read in Ray's dashboard.
    """

    # Ray awaits it; mypy knows no constructor that is awaited.
    async def __init__(  # type: ignore[misc]
        self, name: str, folder: str, settings: Settings
    ) -> None:
        self.settings = settings
        self.token = auth.from_environment()
        self.models = await Models.load({name: Path(folder)}, settings)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Build the application, in the process and the event loop that answer."""
        return application(self.models, self.settings, token=self.token)

    async def check_health(self) -> None:
        """Raise if a model is not ready; Ray replaces a replica that stays so."""
        waiting = [name for name, model in self.models.items() if not model.ready]
        if waiting:
            raise UnavailableError(f"not ready: {', '.join(waiting)}")

    async def __del__(self) -> None:
        """Stop the model process; Ray has waited for the requests in flight."""
        if hasattr(self, "models"):
            await self.models.close(STOP_S)


def app(args: Mapping[str, Any]) -> Application:
    """Build the Ray application; ``InputError`` if an argument is wrong."""
    given = _arguments(args)
    folder = Path(os.path.abspath(given.bundle))  # noqa: PTH100  # of a link, its own name
    settings = given.settings
    if not settings.threads:  # Ray reserves cores without binding a process to them
        settings = msgspec.structs.replace(settings, threads=given.cpus)
    deployed = serve.deployment(
        name="trainkit",
        ray_actor_options={"num_cpus": given.cpus},
        max_ongoing_requests=given.max_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=given.min_replicas,
            initial_replicas=given.min_replicas,
            max_replicas=given.max_replicas,
            target_ongoing_requests=given.target_requests,
        ),
        # Three failures in a row replace a replica. A model process that died is back sooner.
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.timeout_s + STOP_S,
    )(Replica)
    return deployed.bind(given.name or folder.name, str(folder), settings)


def _arguments(args: Mapping[str, Any]) -> Arguments:
    try:
        given = msgspec.convert(dict(args), Arguments, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(
            f"the arguments of trainkit.serve.ray_app:app are wrong: {error}; write for example "
            "bundle=/models/topics max_replicas=4."
        ) from None
    least = min(given.min_replicas, given.cpus, given.max_requests)
    if least < 1 or given.max_replicas < given.min_replicas or not given.target_requests > 0:
        raise InputError(
            "min_replicas, cpus and max_requests must be at least 1, max_replicas at least "
            "min_replicas, and target_requests above 0; correct the arguments."
        )
    return given
