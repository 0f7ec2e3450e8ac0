"""AdaMod as an optimizer of Keras on JAX, to be copied."""

import keras

from optax_adamod import ScaleByAdamodState, scale_by_adamod


@keras.saving.register_keras_serializable("optax_adamod")
class AdaMod(keras.optimizers.Optimizer):
    """AdaMod; every keyword of ``keras.optimizers.Optimizer`` works too."""

    def __init__(self, learning_rate=1e-3, b3=0.999, name="adamod", **options):
        super().__init__(learning_rate=learning_rate, name=name, **options)
        self.b3 = b3

    def build(self, variables):
        """Makes the averages."""
        super().build(variables)
        names = ["mu", "nu", "bound"]
        self.averages = self.add_optimizer_variables(variables, names)

    def update_step(self, gradient, variable, learning_rate):
        """Changes one variable, and its averages."""
        i = self._get_variable_index(variable)
        kept = [average[i] for average in self.averages]
        values = [average.value for average in kept]
        state = ScaleByAdamodState(self.iterations.value, *values)
        tx = scale_by_adamod(b3=self.b3, bound_learning_rate=learning_rate)
        update, state = tx.update(gradient, state)
        for average, value in zip(kept, state[1:], strict=True):
            average.assign(value)
        variable.assign_sub(learning_rate * update)

    def get_config(self):
        """Returns the settings, for ``model.save``."""
        return super().get_config() | {"b3": self.b3}
