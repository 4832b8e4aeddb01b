from importlib.metadata import EntryPoint

import pytest

from wsi_anomaly import plugins
from wsi_anomaly.errors import MissingExtraError, PluginError, UnknownPluginError
from wsi_anomaly.plugins import DETECTORS, load_plugin


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plug-ins of a third party: one lacks a package, one is misspelt."""
    entries = {
        "bare": EntryPoint("bare", "package_that_nobody_has:Detector", DETECTORS),
        "wrong": EntryPoint("wrong", "wsi_anomaly.errors:NoSuchClass", DETECTORS),
    }
    monkeypatch.setattr(plugins, "installed", lambda _: entries)


def test_the_autoencoder_comes_through_its_entry_point() -> None:
    """By the same door as anyone's."""
    assert load_plugin(DETECTORS, "autoencoder").score_names == ("mse",)


def test_an_unknown_name_lists_what_is_installed() -> None:
    """With the nearest first."""
    with pytest.raises(UnknownPluginError, match="did you mean 'autoencoder'"):
        load_plugin(DETECTORS, "autoencoders")


@pytest.mark.usefixtures("offered")
def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    """Not a traceback of an import."""
    with pytest.raises(MissingExtraError, match="pip install package_that_nobody_has"):
        load_plugin(DETECTORS, "bare")


@pytest.mark.usefixtures("offered")
def test_a_registration_without_a_class_is_a_plugin_error() -> None:
    """The message says what was registered."""
    with pytest.raises(PluginError, match="NoSuchClass"):
        load_plugin(DETECTORS, "wrong")
