"""The configuration of a run: its settings, their rules, and where their values come from.

A configuration is resolved once, when a run begins: preset ← dataset ← `--config FILE` ← `--set key=value`. It is then
stored with the run, and every later attempt starts from it. `schema` and `networks` list the settings.
"""

from ddpm.catalogue import LARGEST as LARGEST
from job.config.fields import Section as Section
from job.config.fields import Size as Size
from job.config.fields import average_name as average_name
from job.config.fields import image_size as image_size
from job.config.networks import NETWORKS as NETWORKS
from job.config.presets import EMBEDDED as EMBEDDED
from job.config.presets import PackConfig as PackConfig
from job.config.presets import pack_config as pack_config
from job.config.presets import preset_keys as preset_keys
from job.config.presets import preset_names as preset_names
from job.config.resolve import CHOSEN_ELSEWHERE as CHOSEN_ELSEWHERE
from job.config.resolve import FOLLOWS as FOLLOWS
from job.config.resolve import FREE as FREE
from job.config.resolve import FREE_SECTIONS as FREE_SECTIONS
from job.config.resolve import changed_for_attempt as changed_for_attempt
from job.config.resolve import description_of as description_of
from job.config.resolve import draft as draft
from job.config.resolve import known_keys as known_keys
from job.config.resolve import parse_sets as parse_sets
from job.config.resolve import read_config_file as read_config_file
from job.config.schema import CheckpointConfig as CheckpointConfig
from job.config.schema import DataConfig as DataConfig
from job.config.schema import Drawing as Drawing
from job.config.schema import RunConfig as RunConfig
from job.config.schema import SampleConfig as SampleConfig
from job.config.schema import flatten as flatten
from job.config.schema import layered as layered
from job.config.schema import nearest_name as nearest_name
from job.config.schema import validated as validated
from job.config.yaml_files import parse_mapping as parse_mapping
from job.config.yaml_files import parse_yaml as parse_yaml
from job.config.yaml_files import read_settings as read_settings
