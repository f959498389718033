"""Each study in a few plain words for those who begin: what was asked, and what came out by its verdicts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jbn.studies.study import Verdict


@dataclass(frozen=True)
class Plain:
    """A study in plain words.

    Attributes:
        question: what was asked.
        clauses: what may have come out, each with the claims that it stands for: it holds where all of these hold. Each
            is read after "Found:", "Not so:" or "Open:", whatever came out of the others.
    """

    question: str
    clauses: Mapping[str, tuple[str, ...]]


# No number stands here that another run could change: verdicts alone decide what is said.
PLAIN = {
    "convergence": Plain(
        "Do networks learn in fewer steps with batch norm?",
        {
            "each network that was tried does": (
                "Batch norm reaches an accuracy in fewer steps",
                "With ReLU, too, it takes fewer steps",
                "In a residual network, too, it takes fewer steps",
            ),
            "what a unit inside is given changes less on the way": ("What a unit is given is more stable with it",),
            "sigmoid networks end more accurate": ("Sigmoid units end higher with it",),
            "a residual network whose branches begin at 0 does as well without batch norm": (
                "A residual network whose branches begin at 0 trains as well without it (at most 1.0 points worse)",
            ),
        },
    ),
    "learning-rate": Plain(
        "Can networks be trained at larger learning rates with batch norm?",
        {
            "they can, at rates that fail without it": (
                "Batch norm trains at larger rates",
                "Without batch norm such rates fail",
            ),
            "with batch norm they make fewer errors on new data, each at its best rate": (
                "Batch norm generalizes better, each at its best rate",
            ),
            "batch norm gains little at the rate that is best without it": (
                "At the best rate of none batch norm gains little (at most 1.0 points)",
            ),
            "the larger rates are why batch norm makes fewer errors": (
                "Larger rates, which batch norm makes possible, are the cause of its better generalization",
            ),
        },
    ),
    "initialization": Plain(
        "How much depends on the size of the random weights that a network begins with?",
        {
            "training depends less on this size with batch norm": (
                "Batch norm makes training depend less on the scale of the first parameters",
            ),
            "outputs stay the same whatever this size is, if ε, which is added to the variance, is next to 0": (
                "BN((aW)x) = BN(Wx) for any a",
            ),
            "with batch norm, before training, gradients grow from layer to layer on their way back through a deep "
            "network": ("With batch norm gradients explode with depth before training",),
            "outputs stay the same with the usual ε, too": (
                "BN((aW)x) = BN(Wx) also with the usual ε, which is there for numerical stability",
            ),
        },
    ),
    "placement": Plain(
        "Does batch norm belong before or after the activation?",
        {
            "a bias before batch norm is of no use": ("A bias before the norm is of no use, within 1.0 points",),
            "its scale is of no use where ReLU and a linear layer follow": (
                "A scale is of no use where ReLU and a linear layer follow, within 1.0 points",
            ),
            "before is better by more than 1 point": (
                "Before the activation is the better place, by more than 1.0 points",
            ),
            "after is better": ("After the activation is slightly better",),
        },
    ),
    "regularization": Plain(
        "Does batch norm keep a network from learning its training data by heart, as dropout does?",
        {
            "where many labels are wrong, networks at one learning rate learn them by heart the more, the more rows "
            "share their mean and variance": (
                "At the same rate training and test come apart the more the larger the batch where labels are noise, "
                "too",
            ),
            "where many labels are wrong, batch norm is more than 1 point better by small groups of rows than by whole "
            "batches": (
                "Statistics of small groups generalize better where labels are noise, by more than 1.0 points",
            ),
            "where many labels are wrong, batch norm is more than 1 point better than no norm": (
                "Batch norm regularizes where labels are noise that can be learned by heart, too, by more than 1.0 "
                "points",
            ),
            "where many labels are wrong, dropout can be left out beside batch norm, for 1 point at most": (
                "With batch norm dropout can be removed and at most 1.0 points are lost where labels are noise",
            ),
            "where labels are right, dropout before batch norm costs more than 1 point": (
                "Dropout before batch norm does worse than batch norm alone, by more than 1.0 points: it shifts the "
                "variance in training",
            ),
            "where labels are right, networks at one learning rate learn the training data by heart the more, the more "
            "rows share their mean and variance": (
                "At the same rate training and test come apart the more the larger the batch",
            ),
            "where labels are right, small groups are more than 1 point better than whole batches": (
                "Statistics of small groups generalize better than those of the whole batch, by more than 1.0 points",
            ),
            "where labels are right, batch norm is more than 1 point better than no norm": (
                "Batch norm regularizes: the network generalizes better than without it, by more than 1.0 points",
            ),
            "where labels are right, dropout can be left out beside batch norm, for 1 point at most": (
                "With batch norm dropout can be removed and at most 1.0 points are lost",
            ),
        },
    ),
    "shift": Plain(
        "Does batch norm work because layers are given steadier inputs?",
        {
            "inputs are steadier with batch norm": (
                "Batch norm reduces internal covariate shift: the change of a layer's inputs due to a step of the "
                "parameters",
            ),
            "networks with batch norm learn faster even where noise makes their inputs less steady than without it": (
                "With noise after batch norm, inputs are less stable than without batch norm",
                "With that noise it trains faster than without batch norm",
            ),
            "the loss is smoother along the way of a step": (
                "With batch norm the loss varies less along the gradient, over the same learning rates",
                "With batch norm the gradient changes less along itself, over the same learning rates",
            ),
            "gradients shift further because of it": (
                "Batch norm does not reduce the shift of gradients but often increases it, as a distance",
            ),
            "gradients turn further because of it": (
                "It increases the shift of gradients as an angle, whose cosine falls",
            ),
            "such noise costs hardly any speed": (
                "With that noise it trains nearly as fast as batch norm all the same (at most 1 point less)",
            ),
        },
    ),
    "inference": Plain(
        "Which mean and variance should a trained network use for new data?",
        {
            "early in training with batches of 40, those of all data are more than 1 point better than running "
            "averages of momentum 0.9": (
                "Early in training the statistics of the population evaluate better than running ones, by more than "
                "1.0 points",
            ),
            "at the end with batches of 40, running averages of momentum 0.9 agree with those of all data within 1 "
            "point": (
                "At the end, once the rate has fallen, running statistics agree with the population's, within 1.0 "
                "points",
            ),
            "PyTorch's momentum, taken for Flax's, costs more than 1 point with batches of 4": (
                "PyTorch's momentum 0.1 (here 0.9), taken for the weight of the old value, costs more than 1.0 points "
                "with batches of 4",
            ),
            "PyTorch's momentum, taken for Flax's, costs more than 1 point with batches of 40": (
                "PyTorch's momentum 0.1 (here 0.9), taken for the weight of the old value, costs more than 1.0 points "
                "with batches of 40",
            ),
            "at the end momentum 0.99 still costs more than 1 point with batches of 40": (
                "A momentum of 0.99, the default of Keras, still costs more than 1.0 points after two hundred steps",
            ),
            "batches of 4 are more than 1 point better evaluated by their own statistics": (
                "Networks that batches of 4 have trained do better by the statistics of such batches than by the "
                "population's, by more than 1.0 points",
            ),
            "the unbiased variance is more than 1 point better with batches of 4": (
                "With batches of 4 the unbiased variance, n/(n - 1) times that of the batch, evaluates better, by more "
                "than 1.0 points",
            ),
        },
    ),
    "batch-size": Plain(
        "What do small batches cost batch norm?",
        {
            "they cost accuracy": ("Batch norm loses accuracy where batches are small",),
            "batch renormalization wins a part of it back": ("Batch renormalization mends a part of it",),
            "statistics taken anew after training win a part of it back": (
                "Statistics that are taken anew after training mend a part of it",
            ),
            "group norm is as accurate with 32 rows as with 2, within 1 point": (
                "Group norm does not depend on the batch, from 2 rows to 32, within 1.0 points",
            ),
            "large batches do better by the statistics of small groups": (
                "A large batch does better with the statistics of small groups (ghost)",
            ),
        },
    ),
    "cost": Plain(
        "What does batch norm add to the time and the memory of a training step?",
        {
            "batch norm takes a considerable part of the time of a resnet's step": (
                "Batch norm accounts for a significant fraction of the time of training",
            ),
            "it computes little for each byte that it moves": (
                "It computes few operations for each byte that it moves, as what is bound by the bandwidth of memory "
                "does",
            ),
            "computing its results again instead of keeping them saves half of the memory at the peak, as the compiler "
            "of this device has it": (
                "Up to 50 % of the memory, here of that at the peak, is saved where what norms return is not kept but "
                "found again",
            ),
            "computing its results again takes hardly any time": ("To find it again takes only 0.8 to 2 % more time",),
        },
    ),
    "recurrent": Plain(
        "Does batch norm suit networks that read sequences, and must its scale γ begin small?",
        {
            "with a large γ, and recurrent weights that begin as the identity, the gradients of early steps vanish": (
                "For large γ the gradient of a tanh network, here with the identity for a recurrent kernel, quickly "
                "goes to zero as it goes back in time",
            ),
            "with a small γ these gradients last": ("For small γ the norm of that gradient is nearly constant",),
            "an LSTM (a common network for sequences) ends more accurate with a small γ": (
                "γ should begin small: an LSTM with γ = 0.1 ends more accurate than with γ = 1",
            ),
            "with a large γ gradients vanish whatever the recurrent weights are": (
                "That tanh saturates is enough for it to vanish: so it does with another recurrent kernel",
            ),
            "an LSTM learns in fewer steps with batch norm at γ = 0.1": ("Batch norm makes an LSTM converge faster",),
            "an LSTM makes fewer errors on new data with batch norm at γ = 0.1": (
                "Batch norm makes an LSTM generalize better",
            ),
        },
    ),
}


WORDS: dict[Verdict, str] = {
    "holds": "Found",
    "does not hold": "Not so",
    "not decided within the intervals": "Open",
}


def put(name: str, verdicts: Mapping[str, Verdict]) -> str:
    """Return a study in plain words: what was asked, and what came out; "" for a study that has none.

    Args:
        name: of the study.
        verdicts: by the sentence of the claim.
    """
    plain = PLAIN.get(name)
    if plain is None:
        return ""
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in WORDS}
    for clause, claims in plain.clauses.items():
        found[_all_of(verdicts[claim] for claim in claims)].append(clause)
    told = [f"{WORDS[verdict]}: {'; '.join(clauses)}." for verdict, clauses in found.items() if clauses]
    listed = {claim for claims in plain.clauses.values() for claim in claims}
    return " ".join([plain.question, *told, *["The table has all claims."] * bool(verdicts.keys() - listed)])


def _all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict of all claims together."""
    there = {*verdicts}
    if "does not hold" in there:
        return "does not hold"
    return "holds" if there == {"holds"} else "not decided within the intervals"
