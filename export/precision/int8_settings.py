"""How a graph is quantised to int8; kept in the bundle's manifest."""

from typing import Literal

import msgspec

from trainkit.serve.errors import InputError


class Int8Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is quantised, and with which scales.

    Weights are symmetric, with one scale per column; embeddings have one scale per row.
    ``activations`` is where the scale of a product's input comes from: ``per token``, one for each
    row of the product, so that a text's answer does not depend on the texts beside it; ``static``,
    fixed beforehand from texts (:mod:`~trainkit.export.precision.calibration`), of whose values
    ``percentile`` lie inside the range.

    ``weight_bits`` 7 halves the weights' range: an x86 processor without VNNI adds products of
    bytes in 16 bits, which saturate at full range. ``keep`` names the outputs of products and
    lookups that stay in fp32.
    """

    activations: Literal["per token", "static"] = "per token"
    percentile: float = 100.0
    weight_bits: Literal[7, 8] = 8
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
