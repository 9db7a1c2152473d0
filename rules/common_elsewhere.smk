# Networks that were trained elsewhere: teachers that are adopted, and what is judged beside the
# students, by its weights or by its logits alone.


def judged(study):
    """What is judged beside the students, by name; those without logits on shifted images last."""
    return dict(sorted(study.judge.items(), key=lambda it: not it[1].has_shifted))


def judged_files(study, pattern):
    """Files of what is judged, as far as it has such files; {} being the network."""
    networks = [
        f"{it.folder}/{name}/{seed}"
        for name, it in judged(STUDIES[study]).items()
        if pattern in it.has
        for seed in range(len(it.files))
    ]
    return [f"results/{study}/{pattern.format(network)}" for network in networks]


def judged_name(wildcards):
    """The name under `judge` of what a job is about; None if it is about no such network."""
    role, *rest = Path(wildcards.get("network", ".")).parts or [""]
    return rest[0] if role == "judged" else wildcards.get("judged")


def elsewhere_of(wildcards):
    """What the configuration says of a job's network, if it was trained elsewhere; else None."""
    study = STUDIES[wildcards.study]
    if name := judged_name(wildcards):
        return study.judge[name]
    of_teacher = {"network", "seed"} & {*wildcards.keys()} and not method_of(wildcards)
    teacher = study.own(place_of(wildcards)) if of_teacher else None
    return teacher if teacher and teacher.weights else None


def source_of(wildcards):
    """The file that a job's network comes from, if it was trained elsewhere."""
    elsewhere = elsewhere_of(wildcards)
    # `local`: of the user's, so not below a module's prefix
    return local(elsewhere.source(place_of(wildcards))) if elsewhere else []


def pretrained_of(wildcards):
    """The file of weights that a network's training begins with, if it does."""
    path = parts_of(wildcards)["architecture"].get("pretrained")
    if not isinstance(path, str) or elsewhere_of(wildcards):
        return []
    if not os.path.exists(path):
        raise WorkflowError(f"config.yaml: {path} does not exist")
    return local(path)


def given_logits(of):
    """An input function: the user's file of logits, on the images of `logits` or `shifted`."""
    return lambda wildcards: local(
        getattr(STUDIES[wildcards.study].judge[wildcards.judged], of)[int(wildcards.seed)]
    )


def check_sources(study):
    """Refuse files from elsewhere that are not there.

    Snakemake takes what was made of such a file for a source, and says nothing.
    """
    files = [it.weights for it in study.teachers or []]
    files += [path for it in study.judge.values() for path in (*it.files, *(it.shifted or []))]
    for path in filter(None, files):
        if not os.path.exists(path):
            raise WorkflowError(f"config.yaml: {path} does not exist")


def adopted_parts(study, elsewhere):
    """What is known of a network that was trained elsewhere, if its file does not say more."""
    parts, architecture = study.parts(), elsewhere.architecture or study.architecture
    kept = ("student", "members", "prediction")
    return {**{key: parts[key] for key in kept}, "architecture": architecture.model_dump()}


def adopting(wildcards, elsewhere):
    """The arguments of `adopt` that a study's configuration decides."""
    name = judged_name(wildcards)
    origin = {"study": wildcards.study, "method": name or "teacher"}
    return {
        # A file that is not there fails by this; of its input alone Snakemake says nothing.
        "source": elsewhere.source(place_of(wildcards)),
        "parts": adopted_parts(STUDIES[wildcards.study], elsewhere),
        "is_told": elsewhere.architecture is not None or not name,
        "teaches": not name,
        **elsewhere.model_dump(include={"prefixes", "classes", "mean", "std"}),
        "origin": {**origin, "replicate": int(wildcards.seed)},
    }


# A file of weights says itself which student it holds.
EVERY_ENTRY = {
    "ARCHITECTURES": tuple(sorted(ARCHITECTURES)),
    "STUDENTS": tuple(sorted(named(AnyStudent))),
}


def entries_of(wildcards):
    """`entries` of a job's network."""
    used = entries(parts_of(wildcards))
    return {**used, **EVERY_ENTRY} if judged_name(wildcards) else used


def entries_of_all(study):
    """`entries` of all networks of a study."""
    beside = [adopted_parts(study, it) for it in study.judge.values() if it.weights]
    used = entries(*study.parts_of_pool(), *map(study.parts, study.methods), *beside)
    return {**used, **EVERY_ENTRY} if beside else used


def costs_elsewhere(study):
    """What decides the costs of teachers one by one, and of what is judged; if there are such."""
    found = {}
    if study.teachers:
        of_pool = [cost_of(study, teacher=place) for place in range(study.pool)]
        for it, teacher in zip(of_pool, study.teachers):
            if teacher.weights:
                del it["epochs"], it["batch_size"]
        found["teachers"] = of_pool
    if labels := [it.label for it in judged(study).values() if it.weights]:
        found["judged"] = labels
    return found


def labels_of_weights(study):
    """Labels of the methods and of what is judged by weights, by name."""
    beside = {name: it for name, it in judged(study).items() if it.weights}
    return {name: it.label for name, it in {**study.methods, **beside}.items()}


def judged_firsts(wildcards):
    """Weights of the first seed of what is judged by weights."""
    files = judged_files(wildcards.study, "{}/weights.safetensors")
    return [path for path in files if Path(path).parent.name == "0"]
