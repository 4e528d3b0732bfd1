"""Which warnings fail a test: all but other packages' announcements of changes."""

import warnings

import pytest

ANNOUNCEMENTS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
OURS = (
    "scoredist3d",
    "scoredist3d.ops.native",
    "test_warnings",
    "conftest",
    "shared.method_cases",
    "train_prior",
    "custom.mine",
)
OTHERS = ("torch.jit", "diffusers.models", "importlib._bootstrap", "scoredist3d_of_others", "sys")


def warn(category: type[Warning], module: str) -> None:
    warnings.warn_explicit("will change", category, "file.py", 1, module=module, registry={})


@pytest.mark.parametrize("category", ANNOUNCEMENTS)
def test_announcements_fail_where_our_code_causes_them(category: type[Warning]) -> None:
    for module in OURS:
        with pytest.raises(category):
            warn(category, module)
    for module in OTHERS:
        warn(category, module)


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning, SyntaxWarning])
@pytest.mark.parametrize("module", ["scoredist3d.ops", "torch.jit"])
def test_everything_else_fails_wherever_it_comes_from(category: type[Warning], module: str) -> None:
    with pytest.raises(category):
        warn(category, module)
