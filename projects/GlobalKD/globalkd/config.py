"""Every configuration key of this project, once, with its default and what it means.

Here are the defaults of a run from a config file; what is built by hand, or by a LazyConfig, has
those of its class. `docs/config.md` is generated from the comments of this file.
A comment above a key describes it; the paper's symbol stands where there is one.
"""

from detectron2.config import CfgNode as CN


def add_globalkd_config(cfg: CN) -> None:
    """Add the distillation keys to a Detectron2 config, in place.

    Call it once on the result of `detectron2.config.get_cfg()`, before merging a file. A second
    call leaves the config as it is.

    Args:
        cfg: a Detectron2 config.
    """
    if "GLOBALKD" in cfg.MODEL:
        return
    _add_dataset_keys(cfg)
    _add_wandb_keys(cfg)
    _add_core_keys(cfg)
    _add_teacher_keys(cfg.MODEL.GLOBALKD)
    _add_prototype_keys(cfg.MODEL.GLOBALKD)
    _add_globalkd_loss_keys(cfg.MODEL.GLOBALKD)
    _add_drkd_keys(cfg.MODEL.GLOBALKD)
    _add_comparison_keys(cfg.MODEL.GLOBALKD)
    _add_further_keys(cfg.MODEL.GLOBALKD)


def _add_dataset_keys(cfg: CN) -> None:
    # Your own data in COCO format: a list of [name, annotation JSON, image folder]. The names can
    # then stand in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO = []
    # Your own data in VOC format: a list of [name, folder, split, [class names]]. The folder holds
    # Annotations/, ImageSets/Main/ and JPEGImages/.
    cfg.DATASETS.VOC = []
    # What a step sees depends on SEED and its number alone: the images, their augmentations and the
    # random numbers. A resumed run then equals one that was not interrupted, with any NUM_WORKERS.
    # False: Detectron2's own loader, whose order starts anew at a resume.
    cfg.DATALOADER.EXACT_RESUME = True
    # How many unreadable images each reading process may skip, with a warning. In training another
    # image replaces it; it yields no prototypes; in evaluation its objects count as missed. 0: the
    # first unreadable image ends the run.
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = 0


def _add_wandb_keys(cfg: CN) -> None:
    cfg.WANDB = CN()
    # True sends scalars and images to Weights & Biases as well; needs the package wandb.
    cfg.WANDB.ENABLED = False
    # The project that the run belongs to there; the run is named after OUTPUT_DIR's last folder.
    cfg.WANDB.PROJECT = "globalkd"


def _add_core_keys(cfg: CN) -> None:
    cfg.MODEL.GLOBALKD = CN()
    node = cfg.MODEL.GLOBALKD

    # False trains the student alone: the stock detector, to the bit.
    node.ENABLED = True
    # The distillation losses to apply, by their names in DISTILL_LOSS_REGISTRY. Each one has a
    # node of its own below, with its weight. A weight of 0 is the same as not naming the loss.
    node.LOSSES = ["GlobalKnowledge", "FeatureKnowledge", "ResponseKnowledge"]
    # Student feature maps to distil, for example ["p3", "p4"]. Empty: every level whose stride the
    # teacher has too.
    node.IN_FEATURES = []
    # What counts as an instance in training: "positives" (the student's sampled positive
    # proposals; RetinaNet: its positive anchors) or "ground_truth" (the annotated boxes). Where
    # class predictions are compared is up to the loss: "ResponseKnowledge" has the positives.
    node.INSTANCES = "positives"
    # Sampling points per side of RoIAlign, averaged to one vector an instance and level.
    node.POOLER_RESOLUTION = 7
    # True: before training, copy the teacher's weights into every student parameter outside the
    # backbone's bottom-up part (FPN, RPN, heads) where name and shape agree.
    node.INHERIT_TEACHER_HEADS = False
    # Factor on the weights of all distillation losses, above 0: how strongly the teacher pulls, in
    # one number to tune on your own data (docs/guide.md); the balance of the losses stays.
    node.WEIGHT = 1.0
    # Iterations over which the distillation weights rise linearly from 0. 0: no warm-up.
    node.WARMUP_ITERS = 0
    # Iteration from which on there is no distillation. 0: there always is.
    node.STOP_ITER = 0
    # Decay of the distillation weights towards 0 over SOLVER.MAX_ITER: "none" (the paper's text),
    # "linear" (the authors' released code; better here as well, see docs/globalkd.md) or "cosine".
    node.DECAY = "linear"
    # What a distillation loss that is infinite or NaN does: "raise" ends the run with the loss, the
    # iteration and the images; "skip" warns, and trains that step on the detection losses alone.
    node.NON_FINITE_LOSS = "raise"
    # True also reads checkpoints that hold more than tensors, arrays and plain values. That runs
    # the code that is in them: only for files whose origin you trust.
    node.ALLOW_PICKLE = False


def _add_teacher_keys(node: CN) -> None:
    node.TEACHER = CN()
    # The teacher's Detectron2 config: a file, or a model-zoo name such as
    # "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
    node.TEACHER.CONFIG_FILE = ""
    # The teacher's weights. Empty: what its config names; for a zoo name, the zoo's checkpoint.
    node.TEACHER.WEIGHTS = ""
    # Overrides for the teacher's config, as on a command line: ["KEY", "VALUE", ...].
    node.TEACHER.OPTS = []
    # True allows a teacher whose weights are incomplete, or none at all where WEIGHTS is empty. For
    # trying things out only.
    node.TEACHER.ALLOW_RANDOM_WEIGHTS = False
    # The student's classes among the teacher's, by name or label (from 0), in the student's order:
    # for a teacher that knows more classes, or the same in another order. What its box head takes
    # for one of the others counts as background. Empty: teacher and student have the same classes.
    node.TEACHER.CLASSES = []
    # True allows class names of teacher and dataset that differ (their number must always agree
    # where the response loss is used).
    node.TEACHER.ALLOW_OTHER_CLASSES = False
    # Evaluate the teacher on the first N images of DATASETS.TEST[0] before step 1. 0: do not.
    node.TEACHER.EVAL_IMAGES = 0
    # Number format of the teacher in training: "student" (that of the student's step: float32, or
    # mixed with SOLVER.AMP), "fp32", "bf16" or "fp16". See docs/performance.md.
    node.TEACHER.PRECISION = "student"
    # True runs the teacher's backbone through torch.compile. It compiles at the first step, and
    # again when the size of the images changes.
    node.TEACHER.COMPILE = False
    # Factor on the sides of the images that the teacher sees in training; its maps are then brought
    # to the student's grid. For a teacher that was trained at that size: another one teaches worse
    # (docs/tuning.md). Losses that compare anchors need 1.
    node.TEACHER.INPUT_SCALE = 1.0
    # True records the kernels of the teacher's backbone once for each shape of input and replays
    # them: a GPU that waits for the host to launch them no longer does. The same maps; on a CPU
    # nothing changes. It keeps the memory of a pass (for each shape that is larger than all before
    # it) and takes part of a second for a new shape. ResNets, with FPN or without, can be recorded.
    node.TEACHER.CUDA_GRAPHS = False
    # True runs the teacher's backbone on a CUDA stream of its own, beside the student's forward.
    # The same maps; on a CPU nothing changes. Where it was timed, it gained nothing; see
    # docs/performance.md.
    node.TEACHER.SIDE_STREAM = False


def _add_prototype_keys(node: CN) -> None:
    node.PROTOTYPES = CN()
    # How prototypes are chosen: "pursuit" (the paper's PGM), "kmeans", "dbscan", "ambiguous" or
    # "random" (Table 6 and Fig. 1).
    node.PROTOTYPES.GENERATOR = "pursuit"
    # Prototypes per class and level (paper: K).
    node.PROTOTYPES.NUM = 10
    # Weight of the agreement between the two spaces in the selection (paper: lambda in Eq. 2).
    node.PROTOTYPES.LAMBDA = 10.0
    # Where a refresh takes its instances from: "pass" (a pass over the data) or "harvest"
    # (features that the training steps of the last epoch computed anyway). The first prototypes
    # come from a pass. With "harvest", MIN_BOX_SIZE is exact where images are resized, not cropped.
    node.PROTOTYPES.REFRESH = "pass"
    # For "harvest": the latest instances of each class that each process keeps, on its device.
    # Memory: 4 bytes x classes x this x channels of all levels in both detectors.
    node.PROTOTYPES.RESERVOIR_SIZE = 256
    # Epochs between two refreshes (paper: T). Fractions are allowed. 0: only before the first step.
    node.PROTOTYPES.REFRESH_EPOCHS = 1.0
    # At most this many images per class are used; each image is forwarded once for all its classes.
    # 0: no cap.
    node.PROTOTYPES.MAX_IMAGES_PER_CLASS = 800
    # Boxes with a side shorter than this, in pixels of the original image, are no candidates.
    node.PROTOTYPES.MIN_BOX_SIZE = 30.0
    # L2-normalise features where prototypes are selected and where "pursuit" projects on them.
    # Cosines and reliability always do. Raw features are stored.
    node.PROTOTYPES.NORMALIZE = True
    # Only instances above this percentile of a kernel density in both spaces are candidates (the
    # released code: 40). Takes time quadratic in a class's instances. 0: off.
    node.PROTOTYPES.DENSITY_PERCENTILE = 0.0
    # The space in which "kmeans" and "dbscan" cluster: "teacher" or "student".
    node.PROTOTYPES.SPACE = "teacher"
    # Neighbourhood radius of "dbscan", in units of the median nearest-neighbour distance. Where it
    # finds fewer than NUM clusters, the rest are drawn at random.
    node.PROTOTYPES.DBSCAN_EPS = 2.0
    # Seed of the choice of images and of the generators that draw random numbers.
    node.PROTOTYPES.SEED = 1
    # Folder for the instance features of a pass, as temporary memory-mapped files, where they are
    # larger than memory. Empty: in memory.
    node.PROTOTYPES.FEATURE_DIR = ""
    # A file written by tools/generate_prototypes.py to start from. Empty: generate.
    node.PROTOTYPES.FILE = ""

    node.PROJECTION = CN()
    # Coefficients of an instance on the prototypes: "pursuit" (Eq. 5 on residuals, both spaces
    # coupled) or "cosine" (cosine with each prototype; what the released code computes).
    node.PROJECTION.TYPE = "cosine"
    # lambda of Eq. 5 in the projection "pursuit" and in the reliability "coefficients"; a key of
    # its own, see docs/globalkd.md.
    node.PROJECTION.LAMBDA = 10.0

    node.RELIABILITY = CN()
    # The weight omega of Eq. 8: "coefficients" (how far the pursuit's coefficients lie apart),
    # "max_cosine" (the released code: the largest cosines) or "none" (1 everywhere).
    node.RELIABILITY.TYPE = "coefficients"


def _add_globalkd_loss_keys(node: CN) -> None:
    node.GLOBAL = CN()
    # Weight of the global knowledge, Eq. 6.
    node.GLOBAL.WEIGHT = 5.0
    # "class": coefficients on the prototypes of the instance's own class; "all": of every class.
    node.GLOBAL.SCOPE = "class"
    # Penalty on the coefficients' difference: "l2" (half the square) or "smooth_l1".
    node.GLOBAL.PENALTY = "l2"
    # Weight each instance by its reliability, Eq. 8.
    node.GLOBAL.USE_RELIABILITY = True

    node.FEATURE = CN()
    # Weight of the feature knowledge inside boxes, Eq. 7.
    node.FEATURE.WEIGHT = 1.0
    # Weight of the same distance outside boxes. 0: the paper's text; the released code: 4.
    node.FEATURE.BACKGROUND_WEIGHT = 0.0
    # Side of the kernel of the adapter, the convolution from student to teacher width; odd. The
    # paper does not say; the released code has 3, which costs nine times as much.
    node.FEATURE.ADAPTER_KERNEL = 1
    # A ReLU after the adapter. The paper's text has it, the released two-stage code does not: what
    # comes out of an FPN is signed.
    node.FEATURE.ADAPTER_RELU = False
    # True: all instances have the same weight in total, divided among their cells; for objects of
    # very different size. False (paper and released code): all cells have the same, and large
    # objects count for more.
    node.FEATURE.EQUAL_BOXES = False
    # Weight each instance's cells by its reliability, Eq. 8.
    node.FEATURE.USE_RELIABILITY = True

    node.RESPONSE = CN()
    # Weight of the response knowledge: KL divergence between class predictions.
    node.RESPONSE.WEIGHT = 1.0
    # Temperature of the KL divergence.
    node.RESPONSE.TEMPERATURE = 2.0
    # RetinaNet only: "sigmoid" (binary KL of each class) or "softmax" (as in the released code).
    node.RESPONSE.ONE_STAGE = "sigmoid"
    # Weight each positive by its reliability, Eq. 8.
    node.RESPONSE.USE_RELIABILITY = True


def _add_drkd_keys(node: CN) -> None:
    node.PIXEL_RELATION = CN()
    # Weight of DRKD's pixel-wise relation (loss "PixelRelation"); see docs/drkd.md for its scale.
    node.PIXEL_RELATION.WEIGHT = 4.0
    # Nodes of the reasoning unit on each level, finest first; the last holds for all further ones.
    node.PIXEL_RELATION.NUM_NODES = [64, 64, 256]
    # Channels of a node's state, likewise.
    node.PIXEL_RELATION.STATE_CHANNELS = [128, 128, 512]

    node.INSTANCE_RELATION = CN()
    # Weight of DRKD's instance-wise relation (loss "InstanceRelation"); 1.0 suits "features".
    node.INSTANCE_RELATION.WEIGHT = 0.5
    # What is matched: "matrix" (the relations psi, as in the paper) or "features" (RoI features
    # aggregated by them, as in the released code; of another scale).
    node.INSTANCE_RELATION.MATCH = "matrix"
    # On how many levels, from the finest on.
    node.INSTANCE_RELATION.NUM_LEVELS = 2
    # Bins per side of RoIAlign.
    node.INSTANCE_RELATION.RESOLUTION = 3
    # Channels of the embeddings g1, g2 and g.
    node.INSTANCE_RELATION.EMBEDDING_CHANNELS = 256
    # Hidden channels of the relation filter m. 0: no filter.
    node.INSTANCE_RELATION.FILTER_CHANNELS = 32
    # Weight each annotated box by its reliability, Eq. 8.
    node.INSTANCE_RELATION.USE_RELIABILITY = False

    node.INSTANCE_FEATURE = CN()
    # Weight of DRKD's instance features (loss "InstanceFeature", L_INS).
    node.INSTANCE_FEATURE.WEIGHT = 0.5
    # On how many levels, from the finest on.
    node.INSTANCE_FEATURE.NUM_LEVELS = 2
    # Bins per side of RoIAlign.
    node.INSTANCE_FEATURE.RESOLUTION = 3
    # Weight each annotated box by its reliability, Eq. 8.
    node.INSTANCE_FEATURE.USE_RELIABILITY = False


def _add_comparison_keys(node: CN) -> None:
    node.HINTON = CN()
    # Weight of plain distillation (loss "HintonKD"): KL divergence between class predictions.
    node.HINTON.WEIGHT = 1.0
    # Temperature of the KL divergence.
    node.HINTON.TEMPERATURE = 2.0
    # "positives", or "all": the background's proposals or anchors, too.
    node.HINTON.ROWS = "positives"
    # Weight each positive by its reliability: "+ prototypes" in Table 4.
    node.HINTON.USE_RELIABILITY = False

    node.RKD = CN()
    # Weight of the distances between instances (loss "RKD").
    node.RKD.DISTANCE_WEIGHT = 25.0
    # Weight of the angles between instances.
    node.RKD.ANGLE_WEIGHT = 50.0
    # Relations to "instances", or to "prototypes" in their place: "+ prototypes" in Table 4.
    node.RKD.RELATIONS = "instances"
    # Weight of the relations to prototypes.
    node.RKD.PROTOTYPE_WEIGHT = 5.0
    # At most this many instances of a batch, evenly spaced, are used for angles, whose cost grows
    # with the cube of their number.
    node.RKD.MAX_INSTANCES = 128

    node.DEFEAT = CN()
    # Weight of the maps inside annotated boxes (loss "DeFeat").
    node.DEFEAT.OBJECT_WEIGHT = 3.0
    # Weight of the maps outside.
    node.DEFEAT.BACKGROUND_WEIGHT = 12.0
    # Weight of the class predictions on the foreground.
    node.DEFEAT.POSITIVE_WEIGHT = 0.0
    # Weight of the class predictions on the background.
    node.DEFEAT.NEGATIVE_WEIGHT = 0.0
    # Temperature of both class-prediction terms.
    node.DEFEAT.TEMPERATURE = 1.0
    # Weight each box's cells by its reliability: "+ prototypes" in Table 4.
    node.DEFEAT.USE_RELIABILITY = False

    node.FITNET = CN()
    # Weight of the whole maps (loss "FitNet").
    node.FITNET.WEIGHT = 1.0

    node.FGFI = CN()
    # Weight of the maps near objects (loss "FGFI").
    node.FGFI.WEIGHT = 2.56
    # Share of a box's best IoU above which an anchor makes its cell take part (paper: psi).
    node.FGFI.THRESHOLD = 0.5
    # Weight each box's cells by its reliability.
    node.FGFI.USE_RELIABILITY = False

    node.FBKD = CN()
    # Weight of the spatial attention (loss "FBKD", part of L_AT).
    node.FBKD.SPATIAL_WEIGHT = 2.8
    # Weight of the channel attention (part of L_AT).
    node.FBKD.CHANNEL_WEIGHT = 0.45
    # Weight of the features under attention masks (L_AM).
    node.FBKD.FEATURE_WEIGHT = 0.8
    # Weight of the non-local relations (L_NLD).
    node.FBKD.RELATION_WEIGHT = 0.8
    # Temperature of the attention masks.
    node.FBKD.TEMPERATURE = 0.5

    node.GID = CN()
    # Weight of the general instances' features (loss "GID").
    node.GID.FEATURE_WEIGHT = 0.128
    # Weight of the relations between them.
    node.GID.RELATION_WEIGHT = 40.0
    # Weight of the class predictions of the anchors that they cover.
    node.GID.CLASS_WEIGHT = 0.1
    # Weight of the box predictions of those anchors.
    node.GID.BOX_WEIGHT = 1.0
    # General instances of an image (paper: K).
    node.GID.NUM_INSTANCES = 10
    # IoU above which general instances suppress each other.
    node.GID.NMS_THRESHOLD = 0.3
    # Smallest side of a general instance in pixels of the input: drops boxes in the padding.
    node.GID.MIN_BOX_SIZE = 10.0
    # Smallest IoU at which an anchor belongs to a general instance.
    node.GID.ANCHOR_THRESHOLD = 0.5
    # Bins per side of RoIAlign.
    node.GID.POOLER_RESOLUTION = 10

    node.FEATURE_RICHNESS = CN()
    # Weight of the maps, each cell by the teacher's largest score there (loss "FeatureRichness").
    node.FEATURE_RICHNESS.FEATURE_WEIGHT = 5.12
    # Weight of the dense head's scores (RetinaNet's, or the RPN's), likewise.
    node.FEATURE_RICHNESS.SCORE_WEIGHT = 0.5

    node.RANK_MIMICKING = CN()
    # Weight of the rank of an object's anchors (loss "RankMimicking"; RetinaNet only).
    node.RANK_MIMICKING.WEIGHT = 4.0
    # Weight each object by the mean reliability of its anchors.
    node.RANK_MIMICKING.USE_RELIABILITY = False

    node.PFI = CN()
    # Weight of the maps, each cell by the difference of predictions there (loss
    # "PredictionGuidedImitation"; RetinaNet only).
    node.PFI.WEIGHT = 1.5

    node.ICD = CN()
    # Weight of the instance-conditional imitation (loss "ICD"; its authors: 8 for RetinaNet).
    node.ICD.WEIGHT = 3.0
    # Weight of each of the decoder's two tasks.
    node.ICD.AUXILIARY_WEIGHT = 1.0
    # Channels of the decoder.
    node.ICD.HIDDEN_DIM = 256
    # Attention heads of the decoder.
    node.ICD.NUM_HEADS = 8
    # The imitation reaches the student from this iteration on; the decoder learns from the first.
    node.ICD.START_ITER = 1000
    # Invented objects for each annotated one.
    node.ICD.NEGATIVE_RATIO = 5.0
    # Invented objects fill an image up to this number at most.
    node.ICD.MAX_QUERIES = 100
    # Largest shift of a described centre, in units of the box's size.
    node.ICD.BLUR = 0.3
    # Weight each object's attention by its reliability.
    node.ICD.USE_RELIABILITY = False


def _add_further_keys(node: CN) -> None:
    node.CWD = CN()
    # Weight of the channels' distributions over the cells (loss "CWD").
    node.CWD.WEIGHT = 50.0
    # Temperature of those distributions.
    node.CWD.TEMPERATURE = 1.0

    node.PKD = CN()
    # Weight of the correlation of the maps (loss "PKD"; its authors: 40 for RetinaNet).
    node.PKD.WEIGHT = 24.0

    node.FGD = CN()
    # Weight of the maps on annotated boxes (loss "FGD"; paper: alpha).
    node.FGD.OBJECT_WEIGHT = 0.0512
    # Weight of the maps elsewhere (beta).
    node.FGD.BACKGROUND_WEIGHT = 0.0256
    # Weight of the spatial attention (gamma).
    node.FGD.SPATIAL_WEIGHT = 4.46
    # Weight of the channel attention (gamma).
    node.FGD.CHANNEL_WEIGHT = 0.0512
    # Weight of the maps with their image's context (lambda).
    node.FGD.RELATION_WEIGHT = 11.4
    # Temperature of the attention.
    node.FGD.TEMPERATURE = 0.5
    # Weight each box's cells by its reliability.
    node.FGD.USE_RELIABILITY = False

    node.MGD = CN()
    # Weight of the generated maps (loss "MGD"; its authors: 115 for RetinaNet).
    node.MGD.WEIGHT = 11.4
    # Share of the cells that is hidden (paper: lambda).
    node.MGD.MASK_RATIO = 0.45

    node.DKD = CN()
    # Weight of the target class's probability (loss "DKD", two-stage only; paper: alpha).
    node.DKD.TARGET_WEIGHT = 1.0
    # Weight of the other classes' distribution among themselves (beta).
    node.DKD.OTHERS_WEIGHT = 0.25
    # Temperature of both terms.
    node.DKD.TEMPERATURE = 1.0
    # Weight each positive by its reliability.
    node.DKD.USE_RELIABILITY = False

    node.REVIEW_KD = CN()
    # Weight of the fused levels (loss "ReviewKD").
    node.REVIEW_KD.WEIGHT = 5.0

    node.CROSS_KD = CN()
    # Weight of the class predictions of the teacher's head on the student's features (loss
    # "CrossKD", RetinaNet only).
    node.CROSS_KD.CLASS_WEIGHT = 1.0
    # Weight of its box predictions.
    node.CROSS_KD.BOX_WEIGHT = 1.0
    # The convolution of the head's towers, from 1, after which the teacher's head takes over.
    node.CROSS_KD.DEPTH = 3
