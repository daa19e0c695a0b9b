"""The one table of methods. Adding a method adds a row here; nothing is registered anywhere else. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from spolia.errors import SpoliaError, did_you_mean


@dataclass(frozen=True)
class Method:
    """One method: what it is for, what it must be given, and where its code stands."""

    name: str
    family: str
    summary: str
    paper: str
    needs: str  # what the user must hold: weights, white box, API; unlabelled inputs, labels, nothing
    cost: str
    entry: str  # "module:function"
    settings: str  # class in the same module
    aliases: tuple[str, ...] = ()  # names other tools use for it
    data: str = ""  # what it must see besides weights: unlabelled inputs, labels; empty: nothing

    @property
    def module(self) -> str:
        return self.entry.partition(":")[0]

    def function(self) -> Any:
        return getattr(import_module(self.module), self.entry.partition(":")[2])

    def settings_class(self) -> Any:
        return getattr(import_module(self.module), self.settings)

    def survey(self) -> Any:
        """The function that gathers model-wide statistics before merging, where the module has one."""
        return getattr(import_module(self.module), "survey", None)

    def masks(self) -> Any:
        """The function that marks what each expert keeps of the merged change, where the method has one."""
        return getattr(import_module(self.module), "masks", None) if self.settings_class().masked else None

    def rescalers(self) -> Any:
        """The function that gives each masked expert a factor, where the method has one."""
        return getattr(import_module(self.module), "rescalers", None)


_MERGE = "spolia.methods.merge."
_SPARSE = _MERGE + "sparsify:sparsified"
_SURGERY = "spolia.methods.surgery."
_DISTILL = "spolia.methods.distill."
_META = "spolia.methods.meta."
_LINK = "spolia.methods.link."
_CONTINUAL = "spolia.methods.continual."
_DATAFREE = "spolia.methods.datafree."

METHODS: tuple[Method, ...] = (
    Method(
        "average", "merge", "weighted mean of the experts' weights", "Wortsman et al. 2022, arXiv 2203.05482",
        "weights", "1 read", _MERGE + "average:average", "Average", aliases=("linear",),
    ),
    Method(
        "task_arithmetic", "merge", "base plus scaled task vectors; negative weights unlearn",
        "Ilharco et al. 2023, arXiv 2212.04089", "weights + base", "1 read",
        _MERGE + "task_arithmetic:task_arithmetic", "TaskArithmetic",
    ),
    Method(
        "slerp", "merge", "spherical interpolation between two models", "Shoemake 1985, doi:10.1145/325165.325242",
        "weights", "2 reads", _MERGE + "slerp:slerp", "Slerp",
    ),
    Method(
        "ties", "merge", "trim small changes, elect a sign, merge what agrees", "Yadav et al. 2023, arXiv 2306.01708",
        "weights + base", "3 to 4 reads", _SPARSE, "Ties",
    ),
    Method(
        "dare", "merge", "drop changes at random, rescale the rest, add", "Yu et al. 2024, arXiv 2311.03099",
        "weights + base", "1 to 2 reads", _SPARSE, "Dare", aliases=("dare_linear",),
    ),
    Method(
        "dare_ties", "merge", "drop at random, then elect signs as TIES does", "Yu et al. 2024, arXiv 2311.03099",
        "weights + base", "1 to 2 reads", _SPARSE, "DareTies",
    ),
    Method(
        "della", "merge", "drop at random, small changes more often, then elect signs",
        "Deep et al. 2024, arXiv 2406.11617", "weights + base", "1 to 2 reads, sorts rows", _SPARSE, "Della",
    ),
    Method(
        "della_linear", "merge", "drop at random, small changes more often, then add",
        "Deep et al. 2024, arXiv 2406.11617", "weights + base", "1 to 2 reads, sorts rows", _SPARSE, "DellaLinear",
    ),
    Method(
        "breadcrumbs", "merge", "drop the largest and the smallest changes, add the middle",
        "Davari & Belilovsky 2024, arXiv 2312.06795", "weights + base", "3 reads", _SPARSE, "Breadcrumbs",
    ),
    Method(
        "breadcrumbs_ties", "merge", "breadcrumbs' middle, then elect signs as TIES does",
        "Davari & Belilovsky 2024, arXiv 2312.06795", "weights + base", "3 reads", _SPARSE, "BreadcrumbsTies",
    ),
    Method(
        "nuslerp", "merge", "spherical interpolation by weights; of tensors, rows or columns",
        "Shoemake 1985, doi:10.1145/325165.325242", "weights", "2 reads", _MERGE + "geodesic:nuslerp", "NuSlerp",
    ),
    Method(
        "multislerp", "merge", "mean direction of several models at their mean norm",
        "Buss & Fillmore 2001, doi:10.1145/502122.502124", "weights", "2 reads",
        _MERGE + "geodesic:multislerp", "MultiSlerp",
    ),
    Method(
        "karcher", "merge", "direction nearest to all models by angle, at their mean norm",
        "Buss & Fillmore 2001, doi:10.1145/502122.502124", "weights", "2 reads",
        _MERGE + "geodesic:karcher", "Karcher",
    ),
    Method(
        "model_stock", "merge", "between base and average, as far as the experts agree in direction",
        "Jang et al. 2024, arXiv 2403.19522", "weights + base", "2 reads",
        _MERGE + "model_stock:model_stock", "ModelStock",
    ),
    Method(
        "sce", "merge", "merge where experts differ most, weighed by how much each changed",
        "Wan et al. 2025, arXiv 2408.07990", "weights + base", "2 to 5 reads", _MERGE + "sce:sce", "Sce",
    ),
    Method(
        "ram", "merge", "keep what one expert alone changed, average what several did",
        "Yuan et al. 2026, arXiv 2601.13572", "weights + base", "1 read", _MERGE + "ram:ram", "Ram",
    ),
    Method(
        "ramplus", "merge", "as ram, with what is an expert's own made a little larger",
        "Yuan et al. 2026, arXiv 2601.13572", "weights + base", "2 reads", _MERGE + "ram:ram", "RamPlus",
        aliases=("ramplus_tl",),
    ),
    Method(
        "magmax", "merge", "of all changes of an element the largest", "Marczak et al. 2024, arXiv 2407.06322",
        "weights + base", "1 read", _MERGE + "magmax:magmax", "MagMax",
    ),
    Method(
        "nearswap", "merge", "one model, drawn towards another by no more than t",
        "alchemonaut 2024; Goddard et al. 2024, arXiv 2403.13257", "weights + base", "1 read",
        _MERGE + "nearswap:nearswap", "NearSwap",
    ),
    Method(
        "arcee_fusion", "merge", "of one fine-tune only the changes that stand out",
        "Goddard et al. 2024, arXiv 2403.13257", "weights + base", "4 reads",
        _MERGE + "arcee_fusion:arcee_fusion", "ArceeFusion",
    ),
    Method(
        "passthrough", "merge", "one model as it is, or scaled", "Goddard et al. 2024, arXiv 2403.13257",
        "weights", "1 read", _MERGE + "passthrough:passthrough", "Passthrough",
    ),
    Method(
        "tsv", "merge", "each task's strongest singular directions, turned away from each other",
        "Gargiulo et al. 2025, arXiv 2412.00081", "weights + base", "1 read and SVDs",
        _MERGE + "tsv:tsv", "Tsv",
    ),
    Method(
        "iso_c", "merge", "the summed change with every direction equally strong",
        "Marczak et al. 2025, arXiv 2502.04959", "weights + base", "1 read and eigendecompositions",
        _MERGE + "iso:iso_c", "IsoC",
    ),
    Method(
        "iso_cts", "merge", "as iso_c, with directions of their own for each task",
        "Marczak et al. 2025, arXiv 2502.04959", "weights + base", "2 reads and SVDs",
        _MERGE + "iso:iso_cts", "IsoCts",
    ),
    Method(
        "knots", "merge", "changes turned into one shared basis and merged there; adapters without ever being dense",
        "Stoica et al. 2025, arXiv 2410.19735", "weights + base", "1 read and SVDs", _MERGE + "knots:knots", "Knots",
    ),
    Method(
        "wudi", "merge", "the change that disturbs each expert's own least", "Cheng et al. 2025, arXiv 2503.08099",
        "weights + base", "1 read and 300 products a matrix", _MERGE + "wudi:wudi", "Wudi",
    ),
    Method(
        "awd", "merge", "take out what all changes share, add the rest", "Xiong et al. 2024, arXiv 2411.18729",
        "weights + base", "2 reads and a small solve a row", _MERGE + "awd:awd", "Awd",
    ),
    Method(
        "pcb", "merge", "weights compete by size and agreement, winners are merged",
        "Du et al. 2024, arXiv 2410.02396", "weights + base", "5 to 7 reads", _MERGE + "pcb:pcb", "Pcb",
    ),
    Method(
        "consensus_ta", "merge", "task arithmetic without the weights that only one task uses",
        "Wang et al. 2024, arXiv 2405.07813", "weights + base", "1 read", _MERGE + "tall:consensus_ta", "ConsensusTa",
    ),
    Method(
        "tall_masks", "merge", "the sum of all changes, and a mask an expert that takes its own out again",
        "Wang et al. 2024, arXiv 2405.07813", "weights + base; the task, when used", "2 reads",
        _MERGE + "tall:tall_masks", "TallMasks",
    ),
    Method(
        "emr", "merge", "one elected change, and a mask and a factor an expert that turn it back into its own",
        "Huang et al. 2024, arXiv 2405.17461", "weights + base; the task, when used", "3 reads",
        _MERGE + "emr:emr", "Emr",
    ),
    Method(
        "adamerging", "merge", "learn how much of each expert to add, from inputs without labels",
        "Yang et al. 2024, arXiv 2310.02575", "weights + base; unlabelled inputs", "500 steps of a batch a task",
        _MERGE + "adamerging:adamerging", "AdaMerging", data="unlabelled inputs",
    ),
    Method(
        "fisher", "merge", "weights averaged by how much each expert's predictions depend on them",
        "Matena & Raffel 2022, arXiv 2111.09832", "weights; unlabelled inputs",
        "256 inputs a task, up to 16 backward passes each", _MERGE + "fisher:fisher", "Fisher", data="unlabelled inputs",
    ),
    Method(
        "regmean", "merge", "linear layers solved for, to do on each task's inputs what its expert does",
        "Jin et al. 2023, arXiv 2212.09849", "weights; unlabelled inputs", "256 inputs a task and a solve a layer",
        _MERGE + "regmean:regmean", "RegMean", data="unlabelled inputs",
    ),
    Method(
        "regmean_plus", "merge", "as regmean, layer after layer, on what the merged layers before make of the inputs",
        "Nguyen et al. 2025, arXiv 2508.03121", "weights; unlabelled inputs", "256 inputs a task, a pass a layer",
        _MERGE + "regmean:regmean_plus", "RegMeanPlus", aliases=("regmean_plusplus",), data="unlabelled inputs",
    ),
    Method(
        "surgery", "surgery", "take from a merged model's last feature what merging put there, task by task",
        "Yang et al. 2024, arXiv 2402.02705", "merged weights + experts; unlabelled inputs; the task, when used",
        "1 pass of inputs through each model, then seconds", _SURGERY + "surgery:surgery", "Surgery",
        data="unlabelled inputs",
    ),
    Method(
        "deep", "surgery", "the same after every block of the network", "Yang et al. 2024, arXiv 2410.14389",
        "merged weights + experts; unlabelled inputs; the task, when used",
        "1000 steps of a batch a task; closed form: 2 passes of inputs", _SURGERY + "deep:deep", "Deep",
        aliases=("surgery_v2",), data="unlabelled inputs",
    ),
    Method(
        "kd", "distill", "the teacher's softened distribution, beside the labels", "Hinton et al. 2015, arXiv 1503.02531",
        "teacher outputs, inputs (labels)", "O(B C)", _DISTILL + "kd:kd", "Kd", data="inputs",
    ),
    Method(
        "dkd", "distill", "the target class apart from the others, and these among themselves",
        "Zhao et al. 2022, arXiv 2203.08679", "teacher outputs, inputs, labels", "O(B C)", _DISTILL + "dkd:dkd", "Dkd",
        data="labels",
    ),
    Method(
        "dist", "distill", "correlation with the teacher, over the classes and over the batch",
        "Huang et al. 2022, arXiv 2205.10536", "teacher outputs, inputs (labels)", "O(B C)", _DISTILL + "dist:dist",
        "Dist", data="inputs",
    ),
    Method(
        "nkd", "distill", "the teacher's sureness of the label, and its other classes made to sum to one",
        "Yang et al. 2023, arXiv 2303.13005", "teacher outputs, inputs, labels", "O(B C)", _DISTILL + "nkd:nkd", "Nkd",
        data="labels",
    ),
    Method(
        "lskd", "distill", "logits of mean 0 and deviation 1 first, then KD, DKD or MLKD", "Sun et al. 2024, arXiv 2403.01427",
        "teacher outputs, inputs (labels)", "O(B C)", _DISTILL + "lskd:lskd", "Lskd", data="inputs",
    ),
    Method(
        "mlkd", "distill", "predictions, relations of samples and of classes, at five temperatures and in two views",
        "Jin et al. 2023, doi:10.1109/CVPR52729.2023.02325", "live teacher, two augmentations (labels)",
        "twice the forwards", _DISTILL + "mlkd:mlkd", "Mlkd", data="inputs",
    ),
    Method(
        "ctkd", "distill", "as kd, at a temperature that is learned against the student", "Li et al. 2023, arXiv 2211.16231",
        "teacher outputs, inputs (labels)", "O(B C)", _DISTILL + "ctkd:ctkd", "Ctkd", data="inputs",
    ),
    Method(
        "rkd", "distill", "distances and angles between the samples of a batch", "Park et al. 2019, arXiv 1904.05068",
        "teacher outputs or features (labels)", "O(B^3)", _DISTILL + "rkd:rkd", "Rkd", data="inputs",
    ),
    Method(
        "fitnets", "distill", "a layer of the student led by a layer of the teacher", "Romero et al. 2015, arXiv 1412.6550",
        "white-box teacher, inputs (labels)", "teacher forward", _DISTILL + "fitnets:fitnets", "Fitnets", data="inputs",
    ),
    Method(
        "attention", "distill", "where the teacher's layers look, the student's look too",
        "Zagoruyko & Komodakis 2017, arXiv 1612.03928", "white-box teacher, inputs (labels)", "teacher forward",
        _DISTILL + "attention:attention", "Attention", data="inputs",
    ),
    Method(
        "rkkd", "distill", "the teacher's order of all classes, beside any logit loss",
        "Guan et al. 2025, arXiv 2409.17823", "teacher outputs, inputs (labels)",
        "O(B C) memory; O(B C^2) time exact, O(B C M) expanded", _DISTILL + "rkkd:rkkd", "Rkkd", data="inputs",
    ),
    Method(
        "protonet", "meta", "features in which a class is the mean of its few examples",
        "Snell et al. 2017, arXiv 1703.05175", "a network; labelled training classes", "a forward pass an episode",
        _META + "protonet:protonet", "Protonet", data="labelled classes",
    ),
    Method(
        "maml", "meta", "a start from which a few gradient steps on a support suffice",
        "Finn et al. 2017, arXiv 1703.03400", "a network; labelled training classes",
        "3 to 4 times K steps a task", _META + "maml:maml", "Maml", data="labelled classes",
    ),
    Method(
        "anil", "meta", "as maml, with inner steps that move the head alone", "Raghu et al. 2020, arXiv 1909.09157",
        "a network; labelled training classes", "less than MAML", _META + "anil:anil", "Anil", data="labelled classes",
    ),
    Method(
        "boil", "meta", "as maml, with inner steps that move the body alone", "Oh et al. 2021, arXiv 2008.08882",
        "a network; labelled training classes", "that of MAML", _META + "boil:boil", "Boil", data="labelled classes",
    ),
    Method(
        "reptile", "meta", "train on each task for a while, move the start towards where that led",
        "Nichol et al. 2018, arXiv 1803.02999", "a network; labelled training classes", "K steps a task",
        _META + "reptile:reptile", "Reptile", data="labelled classes",
    ),
    Method(
        "unicorn", "meta", "as maml, with one vector as every class's head: label order does not matter",
        "Ye & Chao 2022, arXiv 2106.16245", "a network; labelled training classes", "K + 1 steps a task, pretraining",
        _META + "unicorn:unicorn", "Unicorn", aliases=("unicorn_maml",), data="labelled classes",
    ),
    Method(
        "msd", "meta", "adapting on any view of a support gives the same answers", "Cheng et al. 2024, arXiv 2408.04590",
        "a network; labelled training classes; views", "that of its base", _META + "msd:msd", "Msd",
        data="labelled classes",
    ),
    Method(
        "finetune", "continual", "train on what is there; the lower bound",
        "McCloskey & Cohen 1989, doi:10.1016/S0079-7421(08)60536-8", "a network; a stream with labels", "1 pass a step",
        _CONTINUAL + "finetune:FinetuneLearner", "Finetune", data="a stream with labels",
    ),
    Method(
        "joint", "continual", "train on all that has come so far; the upper bound",
        "Caruana 1997, doi:10.1023/A:1007379606734", "a network; the whole stream", "1 pass a step and task so far",
        _CONTINUAL + "joint:JointLearner", "Joint", data="the whole stream",
    ),
    Method(
        "er", "continual", "every step also learns from remembered samples", "Chaudhry et al. 2019, arXiv 1902.10486",
        "a network; a stream with labels; a memory", "a pass of the batch and of a replay batch",
        _CONTINUAL + "er:ErLearner", "Er", data="a stream with labels",
    ),
    Method(
        "er_ace", "continual", "as er, with new samples that do not compete with old classes",
        "Caccia et al. 2022, arXiv 2104.05025", "a network; a stream with labels; a memory", "that of er",
        _CONTINUAL + "er_ace:ErAceLearner", "ErAce", data="a stream with labels",
    ),
    Method(
        "der", "continual", "remembered samples have to give the logits they once gave",
        "Buzzega et al. 2020, arXiv 2004.07211", "a network; a stream with labels; a memory", "that of er",
        _CONTINUAL + "der:DerLearner", "Der", data="a stream with labels",
    ),
    Method(
        "derpp", "continual", "as der, and the labels of a second draw", "Buzzega et al. 2020, arXiv 2004.07211",
        "a network; a stream with labels; a memory", "a pass of the batch and of two replay batches",
        _CONTINUAL + "derpp:DerPpLearner", "DerPp", data="a stream with labels",
    ),
    Method(
        "agem", "continual", "no step against the gradient of remembered samples",
        "Chaudhry et al. 2019, arXiv 1812.00420", "a network; a stream with labels; a memory",
        "a pass of the batch and of a reference", _CONTINUAL + "agem:AGemLearner", "AGem", data="a stream with labels",
    ),
    Method(
        "ewc", "continual", "weights that old predictions hang on stay where they were",
        "Kirkpatrick et al. 2017, arXiv 1612.00796", "a network; a stream with labels",
        "1 pass a step, 1,024 inputs a task", _CONTINUAL + "ewc:EwcLearner", "Ewc", data="a stream with labels",
    ),
    Method(
        "si", "continual", "a weight is held by what its way did for the loss", "Zenke et al. 2017, arXiv 1703.04200",
        "a network; a stream with labels", "1 pass a step", _CONTINUAL + "si:SiLearner", "Si",
        data="a stream with labels",
    ),
    Method(
        "mas", "continual", "a weight is held by how much the outputs' length hangs on it",
        "Aljundi et al. 2018, arXiv 1711.09601", "a network; a stream with labels", "1 pass a step, 1,024 inputs a task",
        _CONTINUAL + "mas:MasLearner", "Mas", data="a stream with labels",
    ),
    Method(
        "lwf", "continual", "on new inputs the old classes' outputs stay", "Li & Hoiem 2016, arXiv 1606.09282",
        "a network; a stream with labels", "1 pass a step and one of the old network",
        _CONTINUAL + "lwf:LwfLearner", "Lwf", data="a stream with labels",
    ),
    Method(
        "icarl", "continual", "exemplars by herding, distilled outputs, the nearest class mean",
        "Rebuffi et al. 2017, arXiv 1611.07725", "a network with features; a stream with labels; a memory",
        "that of er, and of the old network", _CONTINUAL + "icarl:ICarlLearner", "ICarl", data="a stream with labels",
    ),
    Method(
        "gdumb", "continual", "collect a balanced memory, fit a new network on it alone",
        "Prabhu et al. 2020, doi:10.1007/978-3-030-58536-5_31", "a network; a stream with labels; a memory",
        "256 passes over the memory a task", _CONTINUAL + "gdumb:GDumbLearner", "GDumb", data="a stream with labels",
    ),
    Method(
        "vcl", "continual", "a Gaussian over each weight, held near the last one", "Nguyen et al. 2018, arXiv 1710.10628",
        "a network; a stream with labels", "1 pass a step; 10 an answer", _CONTINUAL + "vcl:VclLearner", "Vcl",
        data="a stream with labels",
    ),
    Method(
        "cpr", "continual", "predictions kept wide, around any learner", "Cha et al. 2021, arXiv 2006.07326",
        "a network; a stream with labels", "that of its host", _CONTINUAL + "cpr:CprLearner", "Cpr",
        data="a stream with labels",
    ),
    Method(
        "unified", "continual", "divergences of outputs and weights, mixed at will", "Wang et al. 2024, arXiv 2403.13249",
        "a network; a stream with labels", "that of its terms", _CONTINUAL + "unified:UnifiedLearner", "Unified",
        data="a stream with labels",
    ),
    Method(
        "refresh", "continual", "unlearn a little of the batch before learning it again, around any learner",
        "Wang et al. 2024, arXiv 2403.13249", "a network; a stream with labels", "that of its host and 1 pass a step",
        _CONTINUAL + "refresh:RefreshLearner", "Refresh", data="a stream with labels",
    ),
    Method(
        "apis", "continual", "one model from a stream of prediction APIs, without their weights and with little or no data",
        "Yang et al. 2024, arXiv 2309.00023", "APIs to query; no data, or a few labelled examples",
        "1,792 queries a round", _CONTINUAL + "apis:ApisLearner", "Apis", data="answers of APIs",
    ),
    Method(
        "ncm", "continual", "new classes from a few examples by the mean of a frozen encoder's features",
        "Zhou et al. 2023, arXiv 2303.07338", "a pretrained transformer; a stream with labels", "1 pass an example",
        _CONTINUAL + "ncm:NcmLearner", "Ncm", aliases=("simplecil",), data="a stream with labels",
    ),
    Method(
        "l2p", "continual", "a pool of prompts for a frozen transformer, each input takes the nearest",
        "Wang et al. 2022, arXiv 2112.08654", "a pretrained transformer; a stream with labels",
        "2 passes a step and 1 back, prompts alone trained", _CONTINUAL + "l2p:L2pLearner", "L2p",
        data="a stream with labels",
    ),
    Method(
        "dualprompt", "continual", "a shared prompt and one of each session, as prefixes of a frozen transformer",
        "Wang et al. 2022, arXiv 2204.04799", "a pretrained transformer; a stream with labels", "that of l2p",
        _CONTINUAL + "dualprompt:DualPromptLearner", "DualPrompt", data="a stream with labels",
    ),
    Method(
        "coda", "continual", "prompts as weighted sums of components, weighted anew for each input",
        "Smith et al. 2023, arXiv 2211.13218", "a pretrained transformer; a stream with labels", "that of l2p",
        _CONTINUAL + "coda:CodaLearner", "Coda", aliases=("coda_prompt",), data="a stream with labels",
    ),
    Method(
        "asp", "continual", "prompts that fit themselves to inputs, learned once; then classes from five examples each",
        "Liu et al. 2024, arXiv 2403.09857", "a pretrained transformer; base classes, then a few examples of others",
        "3 passes a step and 1 back; new classes 2 passes an example", _CONTINUAL + "asp:AspLearner", "Asp",
        data="a stream with labels",
    ),
    Method(
        "llm_sc", "link", "text through noise, read by what a language model finds likely",
        "Wang et al. 2024, arXiv 2407.14112", "a causal language model, or n-grams, at the receiver",
        "B model passes a token", _LINK + "llm_sc:llm_sc", "LLMSC", data="text to send",
    ),
    Method(
        "separate", "link", "the model compresses, a channel code protects, in as many channel uses",
        "Huang et al. 2025, arXiv 2501.04285", "the same model at both ends, to the last bit",
        "a model pass a token at each end", _LINK + "separate:separate", "Separate", data="text to send",
    ),
    Method(
        "deepsc", "link", "transmitter and receiver learned together, noise between them",
        "Xie et al. 2021, arXiv 2006.10685", "training text of the kind that is sent", "its training; a pass a token",
        _LINK + "deepsc:deepsc", "DeepSC", data="training text",
    ),
    Method(
        "source", "link", "characters by Huffman or at fixed length, and a convolutional code",
        "Huffman 1952, doi:10.1109/JRPROC.1952.273898", "nothing", "no model", _LINK + "source:source_code", "Source",
        data="text to count",
    ),
    Method(
        "free", "datafree", "one generator adapts to each classifier in five steps; a learner whose lessons agree",
        "Wei et al. 2024, arXiv 2405.00984", "a pool of white-box classifiers", "5 passes of a generator a visit",
        _DATAFREE + "free:free", "Free",
    ),
    Method(
        "groupings", "datafree", "train on groups of unlike models, penalise what their gradients disagree on",
        "Wei et al. 2024, arXiv 2405.16560", "a pool of white-box classifiers; nothing else",
        "5 passes of a generator a visit, 2 gradients a model", _DATAFREE + "groupings:groupings", "Groupings",
    ),
    Method(
        "robust", "datafree", "a memory of pseudo-tasks, tasks between tasks, and models that must earn trust",
        "Hu et al. 2023, arXiv 2311.14756", "a pool of white-box classifiers, some of which may lie",
        "5 passes of a generator a visit", _DATAFREE + "robust:robust", "Robust",
    ),
)  # fmt: skip

_BY_NAME = {name: method for method in METHODS for name in (method.name, *method.aliases)}


def data_free(family: str = "merge") -> list[Method]:
    """The family's methods that see weights only."""
    return [method for method in METHODS if method.family == family and not method.data]


def find(name: str, where: str = "") -> Method:
    """The method called `name` (or by one of its aliases); an unknown name is answered with the nearest."""
    if name not in _BY_NAME:
        raise SpoliaError(f"no method is called `{name}`", where=where, mend=did_you_mean(name, _BY_NAME))
    return _BY_NAME[name]


def search(text: str = "") -> list[Method]:
    """Methods whose name, alias, family, summary or paper contains every word of `text`, else the nearest names."""
    words = text.lower().replace("-", "_").split()
    hits = [
        m
        for m in METHODS
        if all(
            any(word in part.lower().replace("-", "_") for part in (m.name, m.family, m.summary, m.paper, *m.aliases))
            for word in words
        )
    ]
    if hits or not words:
        return hits
    import difflib

    near = difflib.get_close_matches("_".join(words), _BY_NAME, 5, 0.5)
    return list(dict.fromkeys(_BY_NAME[name] for name in near))
