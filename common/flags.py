"""Command lines: flags that mean the same in every script, recipes of defaults, shared checks.

p = Parser("cmpl", __doc__, RECIPES)
g = p.data()                         # --data, --root, --split, ... and the script's own
g = p.add_argument_group("method")
g.add_argument("--lam", type=float, default=5.0, help="weight of L_u, Eq. 6")
p.run()                              # --out, --seed, --workers, ...
args = p.parse(argv)
"""

import argparse
import math
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path

from common.data import PER_CLASS, labelled_subset, load_data
from common.errors import UserError, leave, survive_output
from common.run import digest_of_code

LABELS = "ratio", "per_class", "labelled_list"  # ways to say which videos have a label
TEST = "split", "clips", "crops"  # flags of --eval that make it another test, for every script
# What may change between a run and its resumption.
FREE = (
    "out",
    "workers",
    "log_every",
    "eval_every",
    "save_minutes",
    "max_bad",
    "compile",
    "resume_changed",
    "rerun",
)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default unless it is None or False."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser of one script.

    recipes: name of a data set, or of its variant, -> other defaults for it. "name 0.01" and "name 0.1" add
    what depends on the labelled share of the training videos: the nearest, on a log scale, to the share that
    results, however it is asked for. So between 1 % and 10 % the boundary is 3.16 %. stage: of a script that
    has several, each with a parser; recipes may have flags of other stages, and dicts of a value per stage.
    A mistake is one sentence from rank 0 and exit status 2.
    """

    def __init__(self, script, doc, recipes, stage=None):
        survive_output()
        super().__init__(
            description=(doc or script).split("\n")[0], allow_abbrev=False,
            formatter_class=Help,
            epilog="Recipes (other defaults): " + "; ".join(f"{k}: {v}" for k, v in recipes.items()),
        )  # fmt: skip
        self.script, self.recipes, self.stage = script, recipes, stage
        self.error = partial(leave, script)
        self.prog += f" {stage}" if stage else ""

    def say(self, sentence):
        """Print a sentence, of the first rank alone."""
        if os.environ.get("RANK", "0") == "0":
            print(sentence, flush=True)

    def flags(self):
        """All flags, such as "--data"."""
        return self._option_string_actions.keys()

    def data(self, unlabelled="rest", ratio=0.01, crop=True):
        """Add the flags that say which videos and labels; the group, for more of them.

        unlabelled None: the script has no use for videos without a label. crop False: it crops no clips.
        """
        self.ratio, self.crop = ratio, crop
        g = self.add_argument_group("data")
        g.add_argument("--data", default="toy:mini", help="k400, ucf101, hmdb51, ssv2, ..., or a folder")
        recipes = sorted({key.partition(" ")[0] for key in self.recipes})
        g.add_argument("--recipe", choices=recipes,
            help="defaults of a data set, or small: hundreds of small clips; default: --data's")  # fmt: skip
        g.add_argument("--root", help="where the data set is; default: data/<name>")
        g.add_argument("--split", type=int, default=1, help="official split of UCF-101 and HMDB-51")
        g.add_argument("--ratio", type=positive_share, help=f"share of labelled videos; default: {ratio}")
        g.add_argument("--per_class", type=at_least(1), help="labelled videos per class, instead of --ratio")
        g.add_argument("--labelled_list", help="a file that names the labelled videos, instead of --ratio")
        if unlabelled:
            g.add_argument("--unlabelled", choices=["rest", "all"], default=unlabelled,
                help="unlabelled videos: those without a label, or all")  # fmt: skip
        if crop:
            flip = argparse.BooleanOptionalAction
            g.add_argument("--size", type=at_least(1), default=224, help="side of a training crop in pixels")
            g.add_argument("--flip", action=flip, help="mirror clips; default: if the data set allows it")
        return g

    def optimisation(self, items, passes, **defaults):
        """Add the flags of any training, with these defaults; the group, for more of them.

        items: what a step has, such as "labelled clips"; passes: the videos that an epoch is one pass over.
        """
        g = self.add_argument_group("optimisation")
        g.add_argument("--epochs", type=at_least(0.0), help=f"passes over the {passes}")
        g.add_argument("--batch", type=at_least(1), help=f"{items} per GPU and step")
        g.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="sgd has momentum 0.9")
        g.add_argument("--lr", type=at_least(0.0), help="learning rate for --lr_batch, scaled linearly")
        g.add_argument(
            "--lr_batch", type=at_least(1), help=f"{items} per step, over all GPUs, that --lr is for"
        )
        g.add_argument("--weight_decay", type=at_least(0.0), help="weight decay of the optimizer")
        g.add_argument("--warmup", type=at_least(0.0), default=0.0, help="epochs of linear warm-up")
        self.set_defaults(**defaults)
        return g

    def run(self, test_scale=8 / 7):
        """Add the flags of any run and of any test; the group, for more of them.

        test_scale: --test_size over --size, where only that is given.
        """
        self.test_scale = test_scale
        g = self.add_argument_group("run")
        g.add_argument("--out",
            help=f"run folder, resumed; default: runs/{self.script}_<data>_<labels>_<seed>")  # fmt: skip
        g.add_argument("--seed", type=at_least(0, 2**63 - 1), default=0, help="seed of all random draws")
        g.add_argument(
            "--workers", type=at_least(0), default=cores_of_a_rank(8), help="loader processes per GPU"
        )
        g.add_argument("--rerun", action="store_true", help="train anew, in a folder named after the code")
        g.add_argument("--resume_changed", action="store_true", help="go on though the code has changed")
        g.add_argument("--log_every", type=at_least(1), default=10, help="steps between rows of log.jsonl")
        g.add_argument("--eval_every", type=at_least(0.0), default=10.0,
            help="epochs between quick tests; 0: no quick tests")  # fmt: skip
        g.add_argument("--save_minutes", type=at_least(0.0), default=15.0, help="minutes between checkpoints")
        g.add_argument("--max_bad", type=at_least(0.0), default=0.05,
            help="share of unreadable training videos above which the run stops")  # fmt: skip
        g.add_argument("--clips", type=at_least(0), default=10, help="test clips per video")
        g.add_argument("--crops", type=int, choices=[1, 3], default=3, help="test crops per clip")
        if self.crop:
            g.add_argument("--test_size", type=at_least(1), help="side of a test crop; follows from --size")
        g.add_argument("--eval", metavar="MODEL.PT", help="only test this model")
        g.add_argument("--compile", action="store_true", help="torch.compile the networks")
        g.add_argument("--channels_last", action=argparse.BooleanOptionalAction, help="memory layout")
        return g

    def parse(self, argv=None, also=(), follow=()):
        """The arguments, with the defaults of the recipe, checked; what follows from others is filled in.

        also: a script's own flags of --eval that make it another test, which then has another folder.
        follow: pairs of flags; the first, where it is None, has the value of the second, and where it is a
        dict, the dict's value for that of the second. "{out}" in a default stands for --out.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("data", "recipe", *LABELS):
            first.add_argument(f"--{name}")
        known, _ = first.parse_known_args(argv)
        data = known.data or self.get_default("data")
        name = known.recipe or self.recipe_of(data)
        recipe = self.recipes.get(name, {})
        if any(getattr(known, label) is not None for label in LABELS):
            recipe = {flag: value for flag, value in recipe.items() if flag not in LABELS}
        elif all(recipe.get(label) is None for label in LABELS):
            recipe = recipe | {"ratio": self.ratio}
        if self.stage:
            recipe = {flag: value[self.stage] if isinstance(value, dict) else value
                      for flag, value in recipe.items() if f"--{flag}" in self.flags()}  # fmt: skip
        self.set_defaults(**recipe)
        args = self.parse_args(argv)
        if sum(getattr(args, label) is not None for label in LABELS) > 1:
            self.error("give one of --ratio, --per_class and --labelled_list")
        kind = known.recipe or data.split(":")[0]
        shares = {float(key.split()[1]): key for key in self.recipes if key.startswith(f"{kind} ")}
        if shares and not args.eval:
            share = self.labelled_share(args)
            nearest = min(shares, key=lambda x: abs(math.log(x / share)))
            self.set_defaults(**self.recipes[shares[nearest]])
            args = self.parse_args(argv)
            self.say(f"{share:.1%} of the training videos have a label: recipe of {kind} for {nearest:.0%}")
        elif name is None and os.path.isdir(data) and "small" in self.recipes and not args.eval:
            self.say("no --recipe: the defaults are the paper's, for GPUs; --recipe small is for hundreds of "
                     "small clips")  # fmt: skip
        if not args.clips and args.clips is not None and not getattr(args, "uniform", 0):
            self.error("--clips must be at least 1, not 0")
        for flag, other in follow:
            value, of = getattr(args, flag), getattr(args, other)
            setattr(args, flag, of if value is None else value[of] if isinstance(value, dict) else value)
        if self.crop:
            args.test_size = args.test_size or round(args.size * self.test_scale)
        args.recipe, args.out = name, args.out or self.folder(args, also)
        if args.rerun:
            args.out += f"_{digest_of_code(self.script)}"
        if args.eval and Path(args.out, "last.pt").exists():
            self.error(f"--out {args.out} is the folder of a training run: choose another for --eval")
        texts = {flag: value for flag, value in vars(args).items() if isinstance(value, str)}
        vars(args).update((flag, value.replace("{out}", args.out)) for flag, value in texts.items())
        return args

    def folder(self, args, also):
        """The default of --out: for a run, or for a test with --eval beside its model."""
        data, labels = Path(args.data).name.replace(":", "-"), args.ratio or args.per_class or "list"
        if not args.eval:
            return f"runs/{self.script}_{data}_{labels}_{args.seed}"
        net = Path(args.eval).stem.removeprefix("model").removeprefix("_")
        values = {name: getattr(args, name) for name in (*TEST, *also)}
        changed = {name: value for name, value in values.items() if value != self.get_default(name)}
        words = [value if isinstance(value, str) else f"{name}{value}" for name, value in changed.items()]
        return f"{Path(args.eval).parent}/" + "_".join(filter(None, ["eval", data, net, *words]))

    def recipe_of(self, data):
        """The name of the recipe of a data set, or None. Of several, "a,b", all must have one: then it is the
        one that comes last in the order of `recipes`, so that the order of the data sets does not matter.
        """
        keys, names = list(self.recipes), data.split(",")
        recipes = [next((key for key in (name, name.split(":")[0]) if key in keys), None) for name in names]
        return max(recipes, key=keys.index) if all(recipes) else None

    def labelled_share(self, args):
        """The share of the training videos that `labelled_subset` chooses.

        Where they or their list cannot be read, that of the papers' counts; the run will say what is wrong.
        """
        try:
            data = load_data(args.data, args.root, args.split, keep=True)
            with warnings.catch_warnings(action="ignore"):  # the run shows them
                labelled = labelled_subset(data, args.ratio, args.per_class, args.seed, args.labelled_list)
            return len(labelled) / len(data.pool)
        except UserError:
            sizes = {name: count / ratio for (name, ratio), count in PER_CLASS.items()}
            return args.ratio or (args.per_class or 1) / sizes[Path(args.data).name.partition(":")[0]]


class Range(argparse.Action):
    """An argparse action for two numbers, of which the second is not below the first."""

    def __call__(self, parser, args, values, option=None):
        if values[0] > values[1]:
            parser.error(f"{option} is a range such as {' '.join(map(str, self.default))}, not "
                         f"{' '.join(map(str, values))}")  # fmt: skip
        setattr(args, self.dest, values)


def cores_of_a_rank(most=None):
    """How many processor cores there are for each rank of this machine, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(share, most or share)


def free_flags(args, also=()):
    """Names of the flags that may change between a run and the next in its folder, see `Parser.parse`."""
    return vars(args).keys() - {"eval", "data", "root", "flow", *TEST, *also} if args.eval else FREE


def at_least(least, most=math.inf):
    """An argparse type: a finite number of the type of `least`, from that to `most`."""

    def number(text):
        value = type(least)(text)
        if not (least <= value <= most and value < math.inf):  # NaN neither
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    return number


def share(text):
    """An argparse type: a number in [0, 1]."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"is a share in [0, 1], not {text}")
    return float(text)


def positive_share(text):
    """An argparse type: a number in (0, 1]."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"is a share in (0, 1], not {text}; 1 % is 0.01")
    return float(text)


def epochs(text):
    """An argparse type: epochs such as 40,60,80 as a list of numbers, which is empty for "cosine"."""
    if not re.fullmatch(r"cosine|\d+(\.\d+)?(,\d+(\.\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"must be epochs such as 40,60,80, or cosine, not {text}")
    return [] if text == "cosine" else [float(epoch) for epoch in text.split(",")]


def by_stage(argv, parsers, without=()):
    """{stage: the words of argv that are flags of its parser}, for a command that runs all stages.

    without: flags that a single stage must be given. What no stage has is an error.
    """
    if {"-h", "--help"} & set(argv):
        for parser in parsers.values():
            parser.print_help()
        sys.exit()
    words, error, takers = {stage: [] for stage in parsers}, next(iter(parsers.values())).error, []
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            takers = [stage for stage, parser in parsers.items() if flag in parser.flags()]
            if flag in without:
                error(f"{flag} is for one stage: name that first, one of {', '.join(parsers)}")
        if not takers:
            error(f"there is no flag or stage {word}; the stages are {', '.join(parsers)}")
        for stage in takers:
            words[stage].append(word)
    return words


def wanted(args, also=()):
    """What was asked for, {flag: value}, for the RESULT line: labels and seed, or which model to test."""
    names = dict.fromkeys(("eval", *TEST, *also)) if args.eval else (*LABELS, "seed")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def data_flags(parser):
    """The flags of a tool that goes through every file of a data set."""
    parser.add_argument("data", help="name of a data set, or a folder")
    parser.add_argument("--root", help="where the data set is (data/<name> if not given)")
    parser.add_argument("--split", type=int, default=1, help="which lists are read")
    parser.add_argument("--workers", type=at_least(0), default=cores_of_a_rank(), help="processes, or 0")
