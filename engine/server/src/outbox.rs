//! Events on their way from the engine's thread to the tasks that wait for them, a step at a time.
//!
//! Waking a task from another thread may wake a thread, and take a processor from the engine: for every
//! event that is as expensive as the rest of its way. So the engine's thread puts events here and, once all
//! of a step are there, wakes one task, the carrier, which wakes the others where that costs little.
//! An event takes its place in its reader's bounded channel when it is put here: how far a reader may lag
//! behind does not depend on the carrier.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use engine::{Sent, Service};
use tokio::sync::mpsc::{
    OwnedPermit, Sender, UnboundedReceiver, UnboundedSender, unbounded_channel,
};

/// Something for a reader, and its place there.
pub(crate) struct Parcel<T> {
    place: OwnedPermit<T>,
    event: T,
}

/// Where the engine's thread puts events.
pub(crate) struct Outbox<T> {
    parcels: Mutex<Vec<Parcel<T>>>,
    batches: UnboundedSender<Vec<Parcel<T>>>,
}

impl<T: Send + 'static> Outbox<T> {
    /// One that is emptied whenever `service` has handed out the events of a step, until the service or the
    /// outbox is gone; what is in it then is carried too.
    ///
    /// # Panics
    /// Outside of an async runtime: the carrier runs there.
    pub(crate) fn open(service: &Service) -> Arc<Self> {
        let (outbox, batches) = Self::new();
        tokio::spawn(carry(batches));
        let collector = Collector(Arc::downgrade(&outbox));
        service.after_events(Box::new(move || collector.collect()));
        outbox
    }

    fn new() -> (Arc<Self>, UnboundedReceiver<Vec<Parcel<T>>>) {
        let (batches, receiver) = unbounded_channel();
        (Arc::new(Self { parcels: Mutex::default(), batches }), receiver)
    }

    /// Puts an event for `reader` here; says that the reader is gone if it has left, or has no place as it
    /// lags too far behind. Waits for nobody and wakes nobody.
    pub(crate) fn put(&self, reader: &Sender<T>, event: T) -> Sent {
        let Ok(place) = reader.clone().try_reserve_owned() else { return Sent::Gone };
        self.parcels.lock().unwrap_or_else(PoisonError::into_inner).push(Parcel { place, event });
        Sent::Ok
    }

    /// Hands what is here to the carrier.
    fn send(&self) {
        let mut parcels = self.parcels.lock().unwrap_or_else(PoisonError::into_inner);
        if !parcels.is_empty() {
            let next = Vec::with_capacity(parcels.len());
            // Without a carrier its runtime has ended, and all readers with it.
            let _ended = self.batches.send(std::mem::replace(&mut parcels, next));
        }
    }
}

/// Brings events to their readers, in the order in which they were put, until the outbox is gone.
async fn carry<T>(mut batches: UnboundedReceiver<Vec<Parcel<T>>>) {
    while let Some(batch) = batches.recv().await {
        for Parcel { place, event } in batch {
            place.send(event);
        }
    }
}

/// Empties an outbox at the end of every step, and when the engine's thread ends.
struct Collector<T: Send + 'static>(Weak<Outbox<T>>);

impl<T: Send + 'static> Collector<T> {
    fn collect(&self) -> Sent {
        let Some(outbox) = self.0.upgrade() else { return Sent::Gone };
        outbox.send();
        Sent::Ok
    }
}

impl<T: Send + 'static> Drop for Collector<T> {
    fn drop(&mut self) {
        // A sink that panicked has ended the step before its end.
        let _gone = self.collect();
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;

    /// What has arrived.
    fn read(reader: &mut Receiver<u32>) -> Vec<u32> {
        std::iter::from_fn(|| reader.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn a_step_is_one_batch_in_order_and_nothing_arrives_before() {
        let (outbox, mut batches) = Outbox::new();
        let collector = Collector(Arc::downgrade(&outbox));
        let (senders, mut readers): (Vec<_>, Vec<_>) = (0..16).map(|_| channel(8)).unzip();
        for step in 0..3 {
            for (reader, sender) in (0..).zip(&senders) {
                assert_eq!(outbox.put(sender, 100 * reader + 2 * step), Sent::Ok);
                assert_eq!(outbox.put(sender, 100 * reader + 2 * step + 1), Sent::Ok);
            }
            assert!(batches.is_empty());
            assert_eq!(collector.collect(), Sent::Ok);
            assert_eq!(batches.len(), 1);
            let batch = batches.recv().await.unwrap();
            assert_eq!(batch.len(), 32);
            assert!(readers.iter_mut().all(|reader| read(reader).is_empty()));
            for Parcel { place, event } in batch {
                place.send(event);
            }
            for (number, reader) in (0..).zip(&mut readers) {
                let first = 100 * number + 2 * step;
                assert_eq!(read(reader), [first, first + 1]);
            }
        }
        // Nobody is woken for nothing.
        assert_eq!(collector.collect(), Sent::Ok);
        assert!(batches.is_empty());
    }

    #[tokio::test]
    async fn a_reader_that_lags_or_has_left_is_gone_as_soon_as_its_places_are() {
        let (outbox, batches) = Outbox::new();
        let carrier = tokio::spawn(carry(batches));
        let (slow, mut reader) = channel(2);
        assert_eq!(
            [1, 2, 3].map(|event| outbox.put(&slow, event)),
            [Sent::Ok, Sent::Ok, Sent::Gone]
        );
        outbox.send();
        assert_eq!(outbox.put(&slow, 4), Sent::Gone, "carried or not, nothing was read");
        assert_eq!((reader.recv().await, reader.recv().await), (Some(1), Some(2)));
        assert_eq!(outbox.put(&slow, 5), Sent::Ok);
        drop(reader);
        assert_eq!(outbox.put(&slow, 6), Sent::Gone);
        // What was under way to it is in nobody's way, and the carrier ends with the outbox.
        drop(outbox);
        carrier.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_left_when_the_engine_ends_arrives_before_the_end() {
        let (outbox, batches) = Outbox::new();
        tokio::spawn(carry(batches));
        let collector = Collector(Arc::downgrade(&outbox));
        let (sender, mut reader) = channel(8);
        assert_eq!([1, 2].map(|event| outbox.put(&sender, event)), [Sent::Ok, Sent::Ok]);
        // As when a sink panics: all that the engine's thread had is dropped, in any order.
        drop(sender);
        drop(collector);
        assert_eq!((reader.recv().await, reader.recv().await), (Some(1), Some(2)));
        assert_eq!(reader.recv().await, None);
        let collector = Collector(Arc::downgrade(&outbox));
        drop(outbox);
        assert_eq!(collector.collect(), Sent::Gone);
    }
}
