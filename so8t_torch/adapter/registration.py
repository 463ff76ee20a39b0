"""Makes PEFT know the method: the member ``PeftType.SO8T`` and the entry in PEFT's tables.

``register_peft_method`` refuses a name that the enumeration ``PeftType`` does not have, and an enumeration
cannot be extended from outside by ordinary means. This file is the only place that does it anyway.
"""

from __future__ import annotations

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from so8t_torch.core.errors import AdapterError

NAME = "SO8T"


def add_member() -> PeftType:
    """Return ``PeftType.SO8T``, created if PEFT does not have it yet."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # EnumType refuses to assign members; Python 3.12 resolves PeftType.SO8T through the class dictionary
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_class: type, tuner_class: type) -> None:
    """Enter the method into PEFT's tables; a second call with the same classes does nothing.

    Args:
        config_class: the subclass of ``peft.PeftConfig``.
        tuner_class: the subclass of ``peft.tuners.tuners_utils.BaseTuner``.

    Raises:
        AdapterError: another package has registered a different method under this name.
    """
    present = PEFT_TYPE_TO_TUNER_MAPPING.get(add_member())
    if present is tuner_class:
        return
    if present is not None:
        raise AdapterError(
            f"expected to register the PEFT method {NAME} of {tuner_class.__module__}, but peft {peft.__version__} "
            f"already has one from {present.__module__}; import only one of them in a process."
        )
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=tuner_class)
