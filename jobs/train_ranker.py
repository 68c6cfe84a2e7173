"""Training of the ranker on one pinned release, in torch and without a JVM: arms x seeds on the evaluation release, one model to serve.

Test rows lie after the evaluation release's cutoff (jobs/rank_example.py); the served model reads the served release and reports no AUC
of its own when that is another one. The network and its evaluation are pipeline/ranker.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from pipeline.config import TrainRanker
from pipeline.context import Context, derive_seed
from pipeline.errors import ConfigError, ContractError, UpstreamMissing
from pipeline.log import progress
from pipeline.stages import FigureData, ModelBundle, StageResult

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.inputs import Inputs
    from pipeline.ranker import RankData, RankerFit

logger = logging.getLogger(__name__)
SERVED_ARM = "id_sid"


@dataclass(frozen=True)
class Vocabulary:
    """What a release's codes mean: its date, its generation, K per position and the digest a checkpoint is checked against."""

    tag: str
    logical_date: date
    generation: int
    codebook_sizes: tuple[int, ...]
    codebook_digest: str


def run(inputs: Inputs, params: TrainRanker, ctx: Context) -> StageResult:
    """The served model, and for every arm and stratum AUC, GAUC and logloss with paired intervals, when there is a release to test.

    `outputs`: evaluation_release (empty = nothing tested), served_release, codebook_digest, arms, differences, users_covered, note.
    """
    drawn = ctx.outcome("rank_example")["outputs"]
    examples = read_examples(inputs, drawn)
    if not drawn["train_rows"]:
        note = "no training rows in the period: no ranker was trained"
        return StageResult(status="skipped", outputs={"evaluation_release": "", "served_release": drawn["served_release"], "note": note})
    fits: dict[str, list[RankerFit]] = {}
    table: dict[str, Any] = {"arms": {}, "differences": [], "users_covered": None}
    if drawn["evaluation_release"]:
        data = load_data(inputs, examples, vocabulary(inputs, drawn["evaluation_release"]), params.other_release)
        fits = train_arms(data, params, ctx)
        table = _evaluate(data, fits, params, ctx)
    served = vocabulary(inputs, drawn["served_release"])
    model = _served_fit(inputs, examples, served, drawn, fits, params, ctx)
    outputs = {
        "evaluation_release": drawn["evaluation_release"],
        "served_release": served.tag,
        "codebook_digest": served.codebook_digest,
        "examples_digest": drawn["digest"],
        "seeds": params.seeds,
        "embedding_parameters": {arm: runs[0].config["embedding_parameters"] for arm, runs in fits.items()},
        "note": drawn["note"],
        **table,
    }
    curves = {f"ranker/{arm}/seed_{seed}/{name}": values for arm, runs in fits.items() for seed, run in enumerate(runs) for name, values in run.curves.items()}
    return StageResult(metrics=metrics_of(table), curves=curves, outputs=outputs, figures=figures_of(table), model=bundle(model, served, examples))


# ---------------------------------------------------------------- reading


def read_examples(inputs: Inputs, drawn: dict[str, Any]) -> pa.Table:
    """Rows of rank.rank_example that this run drew.

    Raises: UpstreamMissing when the partition holds another release's rows, ContractError when a training row lies after the training period.
    """
    import pyarrow.compute as pc

    rows = inputs.arrow("rank.rank_example", where=f"logical_date == '{date.fromisoformat(drawn['logical_date'])}'")
    found = pc.unique(rows["release"]).to_pylist()
    if rows.num_rows != drawn["train_rows"] + drawn["test_rows"] or found not in ([drawn["example_release"]], []):
        raise UpstreamMissing(
            "the ranking examples are not those this run drew",
            expected=f"{drawn['train_rows'] + drawn['test_rows']} rows of {drawn['example_release']}",
            found=f"{rows.num_rows} rows of {found}",
            where="rank.rank_example",
            next_command="sid run rank_example --date D",
        )
    refuse_leak(rows, date.fromisoformat(drawn["train_until"]))
    return rows


def refuse_leak(examples: pa.Table, train_until: date) -> None:
    """Nothing, when every training row lies on or before the last day of the training period.

    Raises: ContractError otherwise.
    """
    import pyarrow.compute as pc

    latest = pc.max(examples.filter(pc.equal(examples["split"], "train"))["event_ts"]).as_py()
    if latest is not None and latest.date() >= train_until + timedelta(days=1):
        raise ContractError(
            "a training row lies after the training period", expected=f"event_ts up to {train_until}", found=str(latest), where="rank.rank_example"
        )


def vocabulary(inputs: Inputs, tag: str) -> Vocabulary:
    """The vocabulary of a release.

    Raises: UpstreamMissing when sid.release or sid.generation does not know it.
    """
    import pyarrow.compute as pc

    releases = inputs.arrow("sid.release")
    release = releases.filter(pc.equal(releases["tag"], tag)).to_pylist()
    generations = inputs.arrow("sid.generation")
    number = release[0]["generation"] if release else -1
    generation = generations.filter(pc.equal(generations["generation"], number)).to_pylist()
    if not generation:
        raise UpstreamMissing(
            f"no vocabulary for release {tag!r}", expected="rows in sid.release and sid.generation", found=f"generation {number}", where="sid.generation"
        )
    return Vocabulary(tag, release[0]["logical_date"], int(number), tuple(generation[0]["codebook_sizes"]), str(release[0]["codebook_digest"]))


def load_data(inputs: Inputs, examples: pa.Table, words: Vocabulary, other: str = "") -> RankData:
    """The examples beside the codes of a release and, where a tag is given, of a second one, as arrays.

    Raises: ConfigError when the second release knows days that the first one does not.
    """
    from pipeline.ranker import rank_data

    if not other:
        return rank_data(examples, inputs.release(words.tag), words.codebook_sizes)
    second = vocabulary(inputs, other)
    if second.logical_date > words.logical_date:
        raise ConfigError(
            "the second release has seen days that the tested one has not",
            expected=f"a release of {words.logical_date} or before",
            found=f"{other} of {second.logical_date}",
            where="section [train_ranker], key other_release",
            next_command="sid releases",
        )
    return rank_data(examples, inputs.release(words.tag), words.codebook_sizes, (inputs.release(other), second.codebook_sizes))


# ---------------------------------------------------------------- training


def train_arms(data: RankData, params: TrainRanker, ctx: Context) -> dict[str, list[RankerFit]]:
    """Every arm trained with every seed: arm -> fits by seed."""
    from pipeline.ranker import arm_of, fit

    for arm in params.arms:
        arm_of(arm)  # a misspelt arm fails before the first is trained
    todo = [(arm, seed) for arm in params.arms for seed in range(params.seeds)]
    fits: dict[str, list[RankerFit]] = {arm: [] for arm in params.arms}
    for arm, seed in progress(todo, "train_ranker", len(todo)):
        fits[arm].append(fit(data, arm, params, _seed(ctx, seed)))
        logger.info("ranker arm=%s seed=%d train_loss=%.4f", arm, seed, fits[arm][-1].curves["train_loss"][-1])
    return fits


def _evaluate(data: RankData, fits: dict[str, list[RankerFit]], params: TrainRanker, ctx: Context) -> dict[str, Any]:
    from pipeline.ranker import evaluate

    scores = {arm: [run.scores_test for run in runs] for arm, runs in fits.items()}
    return evaluate(data.test, scores)


def _served_fit(
    inputs: Inputs, examples: pa.Table, served: Vocabulary, drawn: dict[str, Any], fits: dict[str, list[RankerFit]], params: TrainRanker, ctx: Context
) -> RankerFit:
    """The fit to serve: the tested one when its release is the served one, else one more on the same rows with the served codes."""
    from pipeline.ranker import fit

    if served.tag == drawn["evaluation_release"] and SERVED_ARM in fits:
        return fits[SERVED_ARM][0]
    logger.info("training the model to serve release=%s arm=%s", served.tag, SERVED_ARM)
    return fit(load_data(inputs, examples, served), SERVED_ARM, params, _seed(ctx, 0))


def _seed(ctx: Context, number: int) -> int:
    return derive_seed(ctx.config.seed, "ranker", number)


# ---------------------------------------------------------------- handing back


def bundle(model: RankerFit, served: Vocabulary, examples: pa.Table) -> ModelBundle:
    """The model with the release it read (information) and the digest of its codebook (checked when it is loaded)."""
    import numpy as np

    config = dict(model.config) | {"sid_version": served.tag, "codebook_digest": served.codebook_digest, "generation": served.generation}
    first = examples.slice(0, 2)
    example = {"user_id": np.asarray(first["user_id"].to_pylist()), "item_id": np.asarray(first["item_id"].to_pylist())}
    return ModelBundle(
        name="sid_ranker", tensors=model.state, config=config, example_input=example, example_output={"logit": np.zeros(first.num_rows, dtype=np.float32)}
    )


def metrics_of(table: dict[str, Any]) -> dict[str, float]:
    """`ranker/<arm>/<stratum>/<metric>` and `ranker/<a>_minus_<b>/<stratum>/<metric>`, what could not be measured left out."""
    measured = {
        f"ranker/{arm}/{stratum}/{metric}": row[metric]
        for arm, strata in table["arms"].items()
        for stratum, row in strata.items()
        for metric in ("auc", "gauc", "logloss")
    }
    measured |= {f"ranker/{row['a']}_minus_{row['b']}/{row['stratum']}/{row['metric']}": row["mean"] for row in table["differences"]}
    return {name: float(value) for name, value in measured.items() if value is not None}


def figures_of(table: dict[str, Any]) -> dict[str, FigureData]:
    """AUC of each arm by stratum, when something was tested."""
    if not table["arms"]:
        return {}
    arms = {arm: {stratum: row["auc"] for stratum, row in strata.items()} for arm, strata in table["arms"].items()}
    rows = {stratum: row["rows"] for stratum, row in next(iter(table["arms"].values())).items()}
    return {"ranker_auc": FigureData(kind="ranker_auc", data={"arms": arms, "rows": rows})}
