"""How a setting that cannot be right is refused, wherever the setting is used."""


def require(key: str, value, right: bool, needed) -> None:
    """Raise a ValueError that names key, value and what would be right, unless it is right.

    Args:
        key: below MODEL.GLOBALKD, such as "PROTOTYPES.NUM".
        value: what it was set to.
        right: whether that is allowed.
        needed: what is, in words, or a list of the allowed values.
    """
    if not right:
        if isinstance(needed, (list, tuple)):
            needed = f"one of {list(needed)}"
        raise ValueError(f"MODEL.GLOBALKD.{key} is {value!r}; it must be {needed}.")
