"""What a request for a profile may hold, the same over HTTP and from `Engine`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trunkline.config.schema import ObserveConfig
from trunkline.engine.fields import Flag, Items, Number, OneOf, Rule, Text, Unsupported
from trunkline.engine.frontend import CoreClient
from trunkline.messages import ProfileDone
from trunkline.types import RequestError

PROFILE_FIELDS: Mapping[str, Rule] = {
    "output_dir": Text(4096, shortest=1),
    "num_steps": Number(1, 100000, integer=True),
    "activities": Items(OneOf(("CPU", "GPU")), 2, fewest=1),
    "with_stack": Flag(),
    "record_shapes": Flag(),
    "profile_prefix": Text(64),
    "start_step": Unsupported((0,), "a profile begins at once"),
    "profile_by_stage": Unsupported((False,), "steps may hold both stages"),
    "profile_id": Unsupported((), "use profile_prefix"),
    "merge_profiles": Unsupported((False,)),
    "profile_stages": Unsupported(([],)),
    "detailed_annotations": Unsupported((False,)),
}


async def start_profile(client: CoreClient, observe: ObserveConfig, fields: Mapping[str, Any]) -> str:
    """Begin a profile; `fields` passed PROFILE_FIELDS. Returns where it will be. Raises RequestError."""
    root = Path(observe.profile_folder or tempfile.gettempdir())
    folder = Path(fields.get("output_dir") or root / "trunkline-profiles")
    prefix = fields.get("profile_prefix", "profile")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise RequestError(
            f"output_dir must be {root} or a folder below it (--profile-folder says where profiles may go)",
            code="folder_not_allowed",
            param="output_dir",
        )
    if not all(one.isalnum() or one in "._-" for one in prefix) or prefix.startswith("."):
        raise RequestError(
            "profile_prefix may have letters, digits, dots, dashes and underscores",
            code="invalid_value",
            param="profile_prefix",
        )
    return _told(
        await client.start_profile(
            folder=str(folder),
            name=prefix,
            num_steps=fields.get("num_steps"),
            activities=fields.get("activities", ["CPU"]),
            with_stack=fields.get("with_stack", False),
            record_shapes=fields.get("record_shapes", False),
        )
    )


async def stop_profile(client: CoreClient) -> str:
    """End the profile and write it. Returns its path. Raises RequestError."""
    return _told(await client.stop_profile())


def _told(done: ProfileDone) -> str:
    if not done.ok:
        raise RequestError(done.message, code="profile_refused")
    return done.message
