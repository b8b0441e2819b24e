"""The fields that specs had when run ids were first made.

They are part of the hash whatever their value. A field added later is not named here: it leaves the
hash at its default, so that the ids of earlier runs stay. Never change this table.
"""

ALWAYS_HASHED: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "Spec": "kind task",
        "TaskSpec": "name options data",
        "TrainSpec": "seed epochs batch_size optimizer lr momentum weight_decay save_epochs "
        "norm_layers norm_reduction norm_skip_epochs",
        "TrainedCheckpoint": "train epoch",
        "FileCheckpoint": "sha256",
        "GradNormsSpec": "checkpoints layers reduction combine precision seed",
        "Query": "test region",
        "Queries": "items quantity noise_draws seed",
        "Curvature": "operator product samples seed",
        "SolverSettings": "name",
        "ConjugateGradientSettings": "damping tolerance max_iterations",
        "LissaSettings": "damping scale depth batch_size repeats",
        "EkFacSettings": "damping",
        "STestSpec": "checkpoint modules queries curvature solver",
        "InfluenceSpec": "s_tests combine relative keep_modules noise_draws seed",
        "AttributionSpec": "norms checkpoint layers queries exclude_norm_above normalize "
        "keep_layers",
        "BaselineSpec": "method queries checkpoint seed",
        "Ranking": "name scores largest",
        "RetrainingSpec": "recipe rankings seeds",
        "AblationSpec": "sizes modes relabel",
        "LdsSpec": "subsets fraction",
        "StabilitySpec": "methods top",
        "PaperSpec": "parts",
    }.items()
}
