"""The known ways to break the code, and the program behind `make mutants`.

    python tests/mutants.py [--only TEXT] [--jobs N] [--timeout SECONDS]

Ends with 0 if every mutant is killed, 1 if one survives or cannot be judged, 2 if the table does not fit the
code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mutation import Mutant, TableError, run, table

ROOT = Path(__file__).resolve().parent.parent

MOMENTS = "src/batchnorm/moments.py"
EAGER = "src/batchnorm/kernels/eager.py"
ACTIVATIONS = "src/batchnorm/kernels/activations.py"
AUTOGRAD = "src/batchnorm/autograd/function.py"
FUNCTIONAL = "src/batchnorm/functional.py"
LAYER = "src/batchnorm/nn/batchnorm.py"
RUNNING = "src/batchnorm/nn/running.py"
LINEAR = "src/batchnorm/nn/linear.py"
RECALIBRATE = "src/batchnorm/lifecycle/recalibrate.py"
COLLECT = "src/batchnorm/lifecycle/recalibration/collect.py"
OBSERVE = "src/batchnorm/lifecycle/recalibration/observe.py"
DEPENDENCE = "src/batchnorm/lifecycle/recalibration/dependence.py"
PASSES = "src/batchnorm/lifecycle/recalibration/passes.py"
GAP = "src/batchnorm/lifecycle/recalibration/gap.py"
PAGES = "src/batchnorm/kernels/cpu/pages.py"

# Quick, and without compiling: what is broken above the kernels shows with the eager one as well.
ON_EAGER = "--backend=eager"
OF_MOMENTS = ("tests/test_moments.py",)
OF_EAGER = ("tests/test_conformance.py", "-k", "public_function and eager")
OF_GRADIENTS = (ON_EAGER, "tests/test_gradients.py", "-k", "not create_graph")
OF_FUNCTIONAL = (ON_EAGER, "tests/test_functional.py")
OF_LAYERS = (ON_EAGER, "tests/nn/test_drop_in.py")
OF_REFUSALS = (ON_EAGER, "tests/nn/test_refusals.py")
OF_LINEAR = (ON_EAGER, "tests/nn/test_linear.py")
OF_PAGES = ("tests/kernels/test_cpu_pages.py",)
OF_RECALIBRATION = (ON_EAGER, "tests/lifecycle/test_recalibrate.py")
OF_SEQUENTIAL = (ON_EAGER, "tests/lifecycle/recalibration/test_sequential.py")
OF_DEPENDENCE = (ON_EAGER, "tests/lifecycle/recalibration/test_dependence.py")
OF_OBSERVE = (ON_EAGER, "tests/lifecycle/recalibration/test_observe.py")
OF_INTERRUPTS = (ON_EAGER, "tests/lifecycle/recalibration/test_interrupts.py", "-k", "few or every_batch")
OF_GAP = (ON_EAGER, "tests/lifecycle/recalibration/test_gap.py")

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "merge: without the cross term",
        MOMENTS,
        "m2 = m2.sum(0) + (count * (mean - whole).square()).sum(0)",
        "m2 = m2.sum(0)",
        OF_MOMENTS,
    ),
    Mutant(
        "merge: parts count alike, whatever their size",
        MOMENTS,
        "(count * (mean - origin)).sum(0) / safe",
        "(mean - origin).mean(0)",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: the unbiased variance divides by n",
        MOMENTS,
        "self.m2 / (self.count if biased else self.count - 1)",
        "self.m2 / self.count",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: weights count where the mask says absent",
        MOMENTS,
        "return torch.where(mask, sample_weight, torch.zeros_like(sample_weight))",
        "return sample_weight",
        OF_MOMENTS,
    ),
    Mutant(
        "moments: no shift, E[x²] − E[x]²",
        MOMENTS,
        "shift = (total / count).to(torch.float32)",
        "shift = torch.zeros_like(total).to(torch.float32)",
        OF_MOMENTS,
    ),
    Mutant(
        "eager: momentum is the weight of the old value",
        EAGER,
        "r.to(value.dtype) * (1 - factor) + value * factor",
        "r.to(value.dtype) * factor + value * (1 - factor)",
        OF_EAGER,
    ),
    Mutant(
        "eager: running_var takes the biased variance",
        EAGER,
        "(running.var, batch.variance(biased=False))",
        "(running.var, batch.variance())",
        OF_EAGER,
    ),
    Mutant(
        "eager: normalizes with the unbiased variance",
        EAGER,
        "stats = torch.stack((found.mean, found.variance()))",
        "stats = torch.stack((found.mean, found.variance(biased=False)))",
        OF_EAGER,
    ),
    Mutant(
        "eager: eps outside the root",
        EAGER,
        "        a = torch.rsqrt(var.to(wide) + eps)",
        "        a = 1 / (torch.sqrt(var.to(wide)) + eps)",
        OF_EAGER,
    ),
    Mutant(
        "eager: the low part of the mean is dropped",
        EAGER,
        "shift = -torch.where(torch.isfinite(lo), lo * a, torch.zeros_like(lo))",
        "shift = torch.zeros_like(lo)",
        OF_EAGER,
    ),
    Mutant(
        "eager: dx without the path through the variance",
        EAGER,
        "through_statistics = centred.mul_(slope).add_(constant)",
        "through_statistics = centred.mul_(0.0).add_(sums[0].to(a.dtype).view(1, -1, 1) / count)",
        OF_EAGER,
    ),
    Mutant(
        "eager: dx without the path through the mean",
        EAGER,
        "constant = _per_channel(sums[0] / count - sweep.affine.lo * per_unit, a.dtype)",
        "constant = _per_channel(-sweep.affine.lo * per_unit, a.dtype)",
        OF_EAGER,
    ),
    Mutant(
        "eager: the mask is ignored in dx",
        EAGER,
        "through_statistics.masked_fill_(~sweep.present[part], 0)",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: the sample weight is ignored in dx",
        EAGER,
        "through_statistics.mul_(weights[part])",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: what is absent is not set to 0",
        EAGER,
        "z = z.masked_fill_(~present[part], 0)",
        "pass",
        OF_EAGER,
    ),
    Mutant(
        "eager: dweight by x − mean, not by x̂",
        EAGER,
        "return sum_dz, sum_dz_centred * torch.rsqrt(var.to(wide) + eps)",
        "return sum_dz, sum_dz_centred",
        OF_EAGER,
    ),
    Mutant(
        "activation: the fused ReLU's sign",
        ACTIVATIONS,
        "torch.where(z <= 0, dy * self.negative_slope",
        "torch.where(z > 0, dy * self.negative_slope",
        OF_EAGER,
    ),
    Mutant(
        "autograd: batch statistics are constants to backward",
        AUTOGRAD,
        "training = call.population is None",
        "training = False",
        OF_EAGER,
    ),
    Mutant(
        "autograd: batch statistics are constants to the second derivative",
        AUTOGRAD,
        "population = None if call.population is None else (stats[0], stats[1])",
        "population = (stats[0], stats[1])",
        OF_GRADIENTS,
    ),
    Mutant(
        "autograd: x is kept where nothing asks for it",
        AUTOGRAD,
        "x if keep_x else None,",
        "x,",
        OF_GRADIENTS,
    ),
    Mutant(
        "functional: momentum of the old value",
        FUNCTIONAL,
        "running = Running(running_mean, running_var, momentum)",
        "running = Running(running_mean, running_var, 1 - momentum)",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "functional: too little weight passes",
        FUNCTIONAL,
        "if least <= 1:",
        "if least <= 0:",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "functional: out= may overwrite the residual before it is read",
        FUNCTIONAL,
        "residual = residual.clone()",
        "pass",
        OF_FUNCTIONAL,
    ),
    Mutant(
        "layer: the counter is raised by a forward that fails",
        LAYER,
        "                functional.check_batch_size(input)\n",
        "                batches = None if batches is None else batches.add_(1)\n"
        "                functional.check_batch_size(input)\n"
        "                batches = None if batches is None else batches.sub_(1)\n",
        OF_REFUSALS,
    ),
    Mutant(
        "layer: a skipped batch reaches the statistics",
        LAYER,
        "return found, None if bad else running",
        "return found, running",
        OF_REFUSALS,
    ),
    Mutant(
        "layer: too_few is not looked at",
        LAYER,
        "input.numel() <= input.shape[1] and mean is not None",
        "False and mean is not None",
        OF_REFUSALS,
    ),
    Mutant(
        "running: the cumulative factor is off by one",
        RUNNING,
        "return Running(mean, var, 1.0 / (int(batches) + 1), batches)",
        "return Running(mean, var, 1.0 / (int(batches) + 2), batches)",
        OF_LAYERS,
    ),
    Mutant(
        "running: a cast to half precision rounds the statistics",
        RUNNING,
        "return before.to(device=buffer.device, dtype=torch.float32)",
        "return buffer.to(torch.float32)",
        OF_LAYERS,
    ),
    Mutant(
        "linear: momentum of the old value",
        LINEAR,
        "momentum: float | None = 0.05",
        "momentum: float | None = 0.95",
        OF_LINEAR,
    ),
    Mutant(
        "linear: fold adds the mean instead of taking it off",
        LINEAR,
        "shift - norm.running_mean.double() * a",
        "shift + norm.running_mean.double() * a",
        OF_LINEAR,
    ),
    Mutant(
        "recalibrate: modes are not restored",
        OBSERVE,
        "            module.training = mode\n",
        "            pass\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: layers keep the forward they had meanwhile",
        OBSERVE,
        'layer.__dict__.pop("forward", None)',
        "pass",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: layers keep the buffers they had meanwhile",
        OBSERVE,
        "            layer._buffers.update({b: t for b, t in originals.items() if b in layer._buffers})\n",
        "",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: an interrupted write is not undone",
        RECALIBRATE,
        "t.copy_(kept)",
        "pass",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: an interrupted end is not made up for",
        RECALIBRATE,
        "        observation.end()\n        for each in written:\n",
        "        for each in written:\n",
        OF_INTERRUPTS,
    ),
    Mutant(
        "recalibrate: the paper's estimator with the biased variance",
        COLLECT,
        "torch.stack([f.variance(biased=False) for f in found])",
        "torch.stack([f.variance() for f in found])",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: takes a batch more than max_batches",
        RECALIBRATE,
        "stream = iter(itertools.islice(batches, max_batches))",
        "stream = (b for i, b in enumerate(batches) if max_batches is None or i < max_batches)",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: dropout stays on",
        OBSERVE,
        "            module.training = False\n",
        "            pass\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "recalibrate: a batch of one is normalized by itself",
        PASSES,
        "        if found is not None and _too_few(found):\n",
        "        if False:\n",
        OF_RECALIBRATION,
    ),
    Mutant(
        "sequential: the layers before go on normalizing as they did",
        PASSES,
        "                observation.put(name, population.mean, population.var)\n",
        "                pass\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: a use that depends on what remains is measured",
        PASSES,
        "        if not depends <= self._group[name]:\n",
        "        if False:\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: a forward ends one use early",
        PASSES,
        "return max((i + 1 for i, name",
        "return max((i for i, name",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: forwards end early where Python reads values",
        PASSES,
        "        same = whole and not dependence.values_were_read and self.order in (None, self._uses)\n",
        "        same = whole and self.order in (None, self._uses)\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "sequential: mutual dependence is measured by statistics that are not there yet",
        PASSES,
        "        by_batch = bool(self._group[name])\n",
        "        by_batch = False\n",
        OF_SEQUENTIAL,
    ),
    Mutant(
        "dependence: in-place writes are not followed",
        DEPENDENCE,
        "            if _version(t) != version:\n",
        "            if False:\n",
        OF_DEPENDENCE,
    ),
    Mutant(
        "dependence: what Python reads is forgotten",
        DEPENDENCE,
        "            self._control |= depends\n",
        "            pass\n",
        OF_DEPENDENCE,
    ),
    Mutant(
        "dependence: what nothing observed depends on nothing",
        DEPENDENCE,
        "self._known.get(storage, self._ran)",
        "self._known.get(storage, NONE)",
        OF_DEPENDENCE,
    ),
    Mutant(
        "observe: functional uses are not looked for",
        OBSERVE,
        "            if name is not None and _fits(",
        "            if name is not None and self._open and _fits(",
        OF_OBSERVE,
    ),
    Mutant(
        "observe: a forward that computes by hand is not noticed",
        OBSERVE,
        "        if opened.seen or not _fits(layer, x):\n",
        "        if True:\n",
        OF_OBSERVE,
    ),
    Mutant(
        "observe: compiled graphs run past it",
        OBSERVE,
        'torch.compiler.set_stance("force_eager")',
        'torch.compiler.set_stance("default")',
        OF_OBSERVE,
    ),
    Mutant(
        "gap: relative to eval",
        GAP,
        "size += float(then.square().sum())",
        "size += float(now.square().sum())",
        OF_GAP,
    ),
    Mutant(
        "gap: of a layer without its stretch",
        GAP,
        "(shift.square() + stretch.square()).mean()",
        "shift.square().mean()",
        OF_GAP,
    ),
    Mutant(
        "quick look: at the dtypes of parameters, not at how many there are",
        FUNCTIONAL,
        "if t.numel() != channels or t.device",
        "if t.device",
        OF_REFUSALS,
    ),
    Mutant(
        "running update: the counter stays behind",
        EAGER,
        "running.batches.add_(1)",
        "running.batches.add_(0)",
        OF_LAYERS,
    ),
    Mutant(
        "pool: a block goes to two tensors",
        PAGES,
        "return self._idle[pages].pop()",
        "return self._idle[pages][-1]",
        OF_PAGES,
    ),
)


def main(arguments: Sequence[str], mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description="Break the code in known ways")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the mutants whose name contains TEXT")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="runs at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each run (default: 300)")
    options = parser.parse_args(arguments)

    chosen = [mutant for mutant in mutants if options.only in mutant.name]
    if not chosen:
        print(f"mutants: expected a mutant with {options.only!r} in its name, got none of {len(mutants)}.")
        return 2
    try:
        outcomes = run(chosen, root, jobs=options.jobs, timeout=options.timeout)
    except TableError as error:
        print(f"mutants: {error}")
        return 2
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        if outcome.output:
            print(f"\n{outcome.name}, {outcome.verdict}:\n{outcome.output.strip()}")
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"\n{killed} of {len(chosen)} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
