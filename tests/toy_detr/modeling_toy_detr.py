from torch import nn

from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.detection import ObjectDetectionModel, SingleScaleModel
from detrkit.models.detr.modeling_detr import Decoder
from detrkit.models.layers.transformer import Encoder, PredictionMLP
from tests.toy_detr.configuration_toy_detr import ToyDetrConfig


class NormalisedEncoder(Encoder):
    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.d_model)

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.last_hidden_state = self.layernorm(output.last_hidden_state)
        return output


class ToyDetrPreTrainedModel(DetrFamilyPreTrainedModel):
    config_class = ToyDetrConfig


class ToyDetrModel(ToyDetrPreTrainedModel, SingleScaleModel):
    decoder_class = Decoder

    def __init__(self, config):
        super().__init__(config)
        self.encoder = NormalisedEncoder(config)
        self.post_init()


class ToyDetrForObjectDetection(ToyDetrPreTrainedModel, ObjectDetectionModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = ToyDetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels)
        self.bbox_predictor = PredictionMLP(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()

    def predict(self, states, features):
        return self.class_labels_classifier(states), self.bbox_predictor(states).sigmoid()
