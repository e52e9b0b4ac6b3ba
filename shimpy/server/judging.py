"""How models that are not here yet would run on this machine: the pull's judge."""

from __future__ import annotations

import msgspec

from shimpy.config import Config
from shimpy.gguf.arch import ModelShape
from shimpy.placement.explain import forecast_line, plan_report, plan_to_json
from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import PlanOptions
from shimpy.registry.choice import Verdict
from shimpy.scheduler.loads import with_defaults


class PlanJudge(msgspec.Struct, frozen=True, kw_only=True):
    """Plans models for one snapshot of the machine."""

    # As it is when no model is loaded.
    hardware: Hardware
    config: Config

    @property
    def vram_bytes(self) -> int:
        """Free on all cards together."""
        return sum(gpu.free_bytes for gpu in self.hardware.gpus)

    @property
    def ram_bytes(self) -> int:
        """Free in the host's memory."""
        return self.hardware.host.available_bytes

    def weigh(self, name: str, shape: ModelShape) -> Verdict:
        """Return how a model would run."""
        options = with_defaults(PlanOptions(), self.config)
        report = plan_report(name, shape, self.hardware, options)
        rung = report.rung
        return Verdict(
            fits=report.plan.chosen is not None,
            is_in_vram=rung.fits and rung.placement.mode == "gpu",
            headline=forecast_line(report),
            reason=report.plan.reason,
            plan=plan_to_json(report),
        )
