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
                "A residual network whose branches begin at 0 trains as well without it",
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
                "At the best rate of none batch norm gains little",
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
            "gradients grow from layer to layer on their way back through a deep network": (
                "With batch norm gradients explode with depth before training",
            ),
            "outputs stay the same with the usual ε, too": (
                "BN((aW)x) = BN(Wx) also with the usual ε, which is there for numerical stability",
            ),
        },
    ),
    "placement": Plain(
        "Does batch norm belong before or after the activation?",
        {
            "a bias before batch norm is of no use": ("A bias before the norm is of no use",),
            "its scale is of no use where ReLU and a linear layer follow": (
                "A scale is of no use where ReLU and a linear layer follow",
            ),
            "before is clearly better": ("Before the activation is the better place, by more than 1.0 points",),
            "after is better": ("After the activation is slightly better",),
        },
    ),
    "regularization": Plain(
        "Does batch norm keep a network from learning its training data by heart, as dropout does?",
        {
            "where many labels are wrong, batch norm does better by small groups of rows than by whole batches": (
                "Statistics of small groups generalize better where labels are noise",
            ),
            "where many labels are wrong, batch norm makes fewer errors than no norm": (
                "Batch norm regularizes where labels are noise that can be learned by heart, too",
            ),
            "where many labels are wrong, dropout can be left out": (
                "With batch norm dropout can be removed where labels are noise",
            ),
            "dropout before batch norm does harm": (
                "Dropout before batch norm does worse than batch norm alone: it shifts the variance in training",
            ),
            "where labels are right, batch norm makes fewer errors than no norm": (
                "Batch norm regularizes: the network generalizes better than without it",
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
            "early in training those of all data are better than running averages": (
                "Early in training the statistics of the population evaluate better than running ones",
            ),
            "at the end both agree": (
                "At the end, once the rate has fallen, running statistics agree with the population's",
            ),
            "PyTorch's momentum, taken for Flax's, costs accuracy with tiny batches": (
                "PyTorch's momentum 0.1 (here 0.9), taken for the weight of the old value, costs accuracy with batches "
                "of 4",
            ),
            "PyTorch's momentum, taken for Flax's, costs accuracy with larger batches": (
                "PyTorch's momentum 0.1 (here 0.9), taken for the weight of the old value, costs accuracy with batches "
                "of 40",
            ),
            "at the end slow averages still cost accuracy": (
                "A momentum of 0.99, the default of Keras, still costs accuracy after two hundred steps",
            ),
            "tiny batches are better evaluated by their own statistics": (
                "Networks that batches of 4 have trained do better by the statistics of such batches than by the "
                "population's",
            ),
            "the unbiased variance helps with tiny batches": (
                "With batches of 4 the unbiased variance, n/(n - 1) times that of the batch, evaluates better",
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
            "group norm does as well with small batches as with larger ones": (
                "Group norm does not depend on the batch, from 2 rows to 32",
            ),
            "large batches do better by the statistics of small groups": (
                "A large batch does better with the statistics of small groups (ghost)",
            ),
        },
    ),
    "cost": Plain(
        "What does batch norm add to the time and the memory of a training step?",
        {
            "batch norm takes a considerable part of the time": (
                "Batch norm accounts for a significant fraction of the time of training",
            ),
            "it computes little for each byte that it moves": (
                "It computes few operations for each byte that it moves, as what is bound by the bandwidth of memory "
                "does",
            ),
            "computing its results again instead of keeping them saves half of the memory": (
                "Up to 50 % of the memory is saved where what norms return is not kept but found again",
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
            "an LSTM learns in fewer steps with batch norm": ("Batch norm makes an LSTM converge faster",),
            "an LSTM makes fewer errors on new data with batch norm": ("Batch norm makes an LSTM generalize better",),
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
    return " ".join([plain.question, *told])


def _all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict of all claims together."""
    there = {*verdicts}
    if "does not hold" in there:
        return "does not hold"
    return "holds" if there == {"holds"} else "not decided within the intervals"
