//! A budget of work, so that no answer takes long whatever it says.

/// Units of work left: about a microsecond each at most.
#[derive(Debug)]
pub(super) struct Fuel(u64);

impl Fuel {
    /// A budget of `units`.
    pub(super) fn new(units: u64) -> Self {
        Self(units)
    }

    /// Spends `units`; `None` when there are not enough, and then none are left.
    pub(super) fn take(&mut self, units: u64) -> Option<()> {
        let left = self.0.checked_sub(units);
        self.0 = left.unwrap_or(0);
        left.map(|_| ())
    }
}
