"""The fields of specs in the first format of run ids.

These fields are always hashed, whatever their value. Later fields are not named here: they are
hashed only if they differ from their default, so that earlier runs keep their ids. Never change
this table.
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
