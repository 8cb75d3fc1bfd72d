"""Build hook: a wheel carries conf/ inside the package; an editable install reads it where it lies."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfInsidePackage(BuildHookInterface):
    def initialize(self, version, build_data):
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"]["conf"] = "luqrun/conf"
