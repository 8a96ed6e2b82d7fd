// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The turn to evict, which one host of a fleet has at a time.

use std::sync::{MutexGuard, PoisonError};

use tracing::debug;

use super::Shared;
use super::fleet::{self, EVICTOR, Evictor};
use crate::storage::StoreError;

impl Shared {
    /// The turn to evict that there is, or was last.
    pub(super) fn turn(&self) -> Result<Option<Evictor>, StoreError> {
        Ok(fleet::evictor(&self.keys(&[EVICTOR])?))
    }

    /// Takes the turn to evict, where no other host has it.
    pub(super) fn take_turn(&self) -> Result<bool, StoreError> {
        loop {
            let was = self.turn()?;
            let is_free = was.as_ref().is_none_or(|was| {
                was.host == self.me.host || self.observer().is_idle(was, fleet::IDLE)
            });
            if !is_free {
                return Ok(false);
            }
            let (write, turn) = fleet::take_turn(was.as_ref(), &self.me.host);
            if self.write(&write)? {
                *self.held_turn() = Some(turn);
                return Ok(true);
            }
        }
    }

    /// Whether the turn is this host's still.
    ///
    /// # Errors
    /// Where it is not.
    pub(super) fn check_turn(&self, held: &Evictor) -> Result<(), StoreError> {
        if self.turn()?.as_ref() == Some(held) {
            return Ok(());
        }
        Err(StoreError::Failed(format!(
            "{}: the turn to evict has passed to another host",
            self.name
        )))
    }

    /// Ends this host's turn. Where that does not get through, another host takes it over in time.
    pub(super) fn end_turn(&self) {
        let Some(held) = self.held_turn().take() else {
            return;
        };
        if let Err(error) = self.write(&fleet::end_turn(&held)) {
            debug!(%error, "the turn to evict is not given back");
        }
    }

    /// This process's turn to evict.
    pub(super) fn held_turn(&self) -> MutexGuard<'_, Option<Evictor>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
