"""Training-time augmentation: `--augment 'channel:gain_db=10,tilt=0.5;specaugment:freq_width=8'`."""

from fairseq_ext.speaker.augment import codecs as codecs
from fairseq_ext.speaker.augment.crops import AUGMENTATIONS as AUGMENTATIONS
from fairseq_ext.speaker.augment.crops import Context as Context
from fairseq_ext.speaker.augment.crops import add_noise as add_noise
from fairseq_ext.speaker.augment.crops import build_augmentation as build_augmentation
from fairseq_ext.speaker.augment.crops import change_speed as change_speed
from fairseq_ext.speaker.augment.crops import mel_frequencies as mel_frequencies
from fairseq_ext.speaker.augment.crops import random_channel as random_channel
from fairseq_ext.speaker.augment.crops import random_noise as random_noise
from fairseq_ext.speaker.augment.crops import random_reverb as random_reverb
from fairseq_ext.speaker.augment.crops import reverberate as reverberate
from fairseq_ext.speaker.augment.crops import spec_augment as spec_augment
from fairseq_ext.speaker.augment.crops import tilt_response_db as tilt_response_db
