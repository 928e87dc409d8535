"""Discrete events in virtual time that drive the policies of hasgpu-core."""

from hasgpu_sim.scenario import FunctionLoad, FunctionResult, Scenario, SimResult, Timing
from hasgpu_sim.simulate import simulate

__all__ = ["FunctionLoad", "FunctionResult", "Scenario", "SimResult", "Timing", "simulate"]
