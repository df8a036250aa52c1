"""Cases of the policy family: those of every cases_*.py beside this file."""

import importlib
import pkgutil

import bench.policy
from bench.harness import Case


def cases() -> list[Case]:
    names = sorted(module.name for module in pkgutil.iter_modules(bench.policy.__path__))
    modules = [importlib.import_module(f"bench.policy.{name}") for name in names if name.startswith("cases_")]
    return [case for module in modules for case in module.cases()]
