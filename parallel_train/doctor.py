"""Is this machine, or this job of several processes, fit to train? One line a check, with what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from parallel_train import checks, processes
from parallel_train.checks import Finding, Patient
from parallel_train.errors import UserError

CHECKS: dict[str, Callable[[Patient], Finding]] = {
    'versions': checks.versions,
    'devices': checks.devices,
    'TensorFlow': checks.tensorflow,
    'processes': checks.processes_alike,
    'clocks': checks.clocks,
    'all-reduce': checks.all_reduce,
    'gradients': checks.gradients,
    'dataset': checks.data,
    'workdir': checks.workdir,
    'compilation cache': checks.compilation_cache,
    'open files': checks.open_files,
}


def examine(patient: Patient) -> dict[str, Finding]:
    """Makes every check, on all processes of the job; what a check raises is its finding.

    A finding is that of process 0 unless another process has a worse one, which is then named.
    """
    findings = {}
    for name, check in CHECKS.items():
        try:
            found = check(patient)
        except UserError as error:
            found = Finding(False, str(error))
        except Exception as error:  # a check that cannot be made is red, and the others go on
            found = Finding(False, f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}')
        everyone = processes.gather(name, dataclasses.asdict(found))
        bad = [i for i, told in enumerate(everyone) if not told['ok']]
        chosen = Finding(**everyone[bad[0] if bad else 0])
        if bad and len(everyone) > 1:
            chosen = dataclasses.replace(chosen, text=f'process {", ".join(map(str, bad))}: {chosen.text}')
        findings[name] = chosen
    return findings


def report(findings: dict[str, Finding], as_json: bool, colours: bool) -> str:
    """Returns the findings as text fit for a bug report, or as JSON."""
    if as_json:
        return json.dumps({name: dataclasses.asdict(found) for name, found in findings.items()}, indent=2)
    lines = []
    for name, found in findings.items():
        mark = 'ok  ' if found.ok else 'FAIL'
        if colours:
            mark = f'\x1b[{32 if found.ok else 31}m{mark}\x1b[0m'
        lines.append(f'{mark}  {name:<18}{found.text}')
        if found.remedy and not found.ok:
            lines.append(f'      {"":<18}→ {found.remedy}')
    return '\n'.join(lines)


def diagnose(config: Any, given: dict[str, Any], as_json: bool, colours: bool) -> bool:
    """Examines this machine or job, prints the findings on process 0, and returns whether all are green."""
    findings = examine(Patient(config, **given))
    if processes.is_first():
        print(report(findings, as_json, colours), flush=True)
    return all(found.ok for found in findings.values())
