"""Classes by name, where others have them in another order."""

from collections.abc import Sequence


def class_order(names: Sequence[str] | None, wanted: Sequence[str]) -> list[int]:
    """The output of each of the study's classes.

    Args:
        names: of the outputs, in their order; None if they are those wanted.
        wanted: the study's classes in their order.

    Raises:
        ValueError: a class has no output.
    """
    if names is None:
        return list(range(len(wanted)))
    places = {name: place for place, name in enumerate(names)}
    if absent := [name for name in wanted if name not in places]:
        raise ValueError(
            f"none of its {len(names)} classes ({', '.join(names[:3])}, …) is the study's class "
            f"{absent[0]!r}: name them by 'classes' as the study does, in the order of the outputs"
        )
    return [places[name] for name in wanted]
