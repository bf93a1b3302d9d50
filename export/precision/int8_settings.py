"""How a graph is quantised to int8: one value, kept in the manifest of what was made with it."""

from typing import Literal

import msgspec

from trainkit.serve.errors import InputError

__all__ = ["Int8Settings"]


class Int8Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is quantised, and with which scales.

    ``activations`` is where the scale of a product's input comes from: ``dynamic``, one for the
    whole batch, from its least and largest value; ``per token``, one for each row of the product,
    so that a text's answer does not depend on the texts beside it; ``static``, fixed beforehand
    from texts (:mod:`~trainkit.export.precision.calibration`), of which ``percentile`` lies inside.

    ``per_channel`` gives each column of a weight its own scale, else the weight has one.
    ``weight_bits`` 7 halves the weights' range: an x86 processor without VNNI adds products of
    bytes in 16 bits, which saturate at full range. ``signed`` weights are symmetric about zero;
    unsigned ones have a zero point, never saturate, and cost more.

    ``embeddings`` are stored in one byte a value and dequantised after the lookup. ``keep`` names
    the outputs of products and lookups that stay in fp32.
    """

    activations: Literal["dynamic", "per token", "static"] = "dynamic"
    percentile: float = 100.0
    per_channel: bool = True
    signed: bool = True
    weight_bits: Literal[7, 8] = 8
    embeddings: Literal["per row", "per tensor", "fp32"] = "per row"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(
                f"percentile must be over 50 and at most 100, not {self.percentile}; 100 takes the "
                "least and the largest value."
            )
        if self.percentile != 100 and self.activations != "static":
            raise InputError(
                f"percentile {self.percentile} goes with static activations, not "
                f"{self.activations}; leave it out."
            )
