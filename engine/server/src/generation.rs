//! Requests on their way through the engine, from the side of an HTTP handler.
//!
//! The engine's thread puts events into the [`Outbox`](crate::outbox::Outbox), whence they come into a bounded
//! channel; the handler pulls them. Whoever drops a [`Generation`] before its end aborts what is left of it, and
//! what the engine has not taken in yet: that is how a client that has gone away gives its blocks back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use engine::{ErrorKind, Event, Request, RequestId, SampleError, Sent, Service, Sink};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::api_error::ApiError;
use crate::app::{App, Log, LogEvent};
use crate::metrics::{Metrics, Timer};
use crate::params::refusal;

/// Events a client may lag behind for every sample, before its request is aborted.
const LAG_PER_SAMPLE: usize = 1024;
/// Events a client may lag behind in all.
const MAX_LAG: usize = 64 * LAG_PER_SAMPLE;

/// Events of several requests, as one sequence.
pub(crate) struct Generation {
    service: Arc<Service>,
    metrics: Arc<Metrics>,
    log: Option<Log>,
    timer: Timer,
    /// When the answer has to be whole, and how long that was from its begin.
    deadline: Option<(Instant, Duration)>,
    events: mpsc::Receiver<(usize, Event)>,
    /// Says whether the engine has taken the requests in.
    taken: Taken,
    /// Tokens of each prompt, and the most that each of its samples may have.
    told: Vec<(usize, Option<usize>)>,
    samples: usize,
    ids: Vec<RequestId>,
    /// Samples that have not ended; none before the engine has taken them in.
    open: usize,
}

/// Comes when the engine has taken requests in, or not.
type Taken = oneshot::Receiver<engine::Result<Vec<RequestId>>>;

/// A share of [`App::handed`], given back when dropped.
struct Handed {
    all: Arc<AtomicUsize>,
    samples: usize,
}

impl Handed {
    fn new(all: &Arc<AtomicUsize>, samples: usize) -> Self {
        all.fetch_add(samples, Ordering::Relaxed);
        Self { all: Arc::clone(all), samples }
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        self.all.fetch_sub(self.samples, Ordering::Relaxed);
    }
}

impl Generation {
    /// Hands `requests`, each of `samples` samples, to the engine, and waits for nobody: it
    /// [takes them in](Self::taken_in) when it is there.
    pub(crate) fn submit(app: &App, requests: Vec<Request>, samples: usize) -> Self {
        let choices = requests.len() * samples;
        let (sender, events) = mpsc::channel((LAG_PER_SAMPLE * choices).clamp(1, MAX_LAG));
        let (tell, taken) = oneshot::channel();
        let told = requests.iter().map(|one| (one.prompt.len(), one.params.max_tokens)).collect();
        let generation = Self {
            service: Arc::clone(&app.service),
            metrics: Arc::clone(&app.metrics),
            log: app.config.log.clone(),
            timer: Timer::new(requests.len(), samples),
            deadline: app.config.request_timeout.map(|limit| (Instant::now() + limit, limit)),
            events,
            taken,
            told,
            samples,
            ids: Vec::new(),
            open: 0,
        };
        let with_sink = |(prompt, request)| {
            let (outbox, sender) = (Arc::clone(&app.outbox), sender.clone());
            let sink = move |event: Event| {
                let choice = prompt * samples + sample(&event);
                outbox.put(&sender, (choice, event))
            };
            (request, Box::new(sink) as Sink)
        };
        let requests = requests.into_iter().enumerate().map(with_sink).collect();
        let handed = Handed::new(&app.handed, choices);
        let told = move |taken| {
            drop(handed);
            tell.send(taken).map_or(Sent::Gone, |()| Sent::Ok)
        };
        app.service.submit_all_then(requests, Box::new(told));
        generation
    }

    /// Waits until the engine has taken all requests in, at most for the time that a request may take: an
    /// engine whose weights are being updated is away for a while.
    ///
    /// # Errors
    /// When the engine refuses one of them, none runs then; when it has stopped, or the time is over.
    pub(crate) async fn taken_in(&mut self) -> Result<(), ApiError> {
        let taken = match self.deadline {
            None => (&mut self.taken).await,
            Some((deadline, limit)) => timeout_at(deadline, &mut self.taken)
                .await
                .map_err(|_elapsed| ApiError::deadline(limit))?,
        };
        let ids = taken.map_err(|_dropped| ApiError::engine_dead())?;
        self.ids = ids.map_err(|error| failed(&error))?;
        self.open = self.told.len() * self.samples;
        for (tokens, max_tokens) in &self.told {
            self.metrics.begun(*tokens, self.samples, *max_tokens);
        }
        Ok(())
    }

    /// The engine's names for what runs.
    pub(crate) fn ids(&self) -> &[RequestId] {
        &self.ids
    }

    /// The next event and the choice it belongs to; `None` when every sample has ended.
    ///
    /// # Errors
    /// When a sample failed, the engine stopped, the client lagged too far behind, or the time is over.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        if self.open == 0 {
            return Ok(None);
        }
        let event = match self.deadline {
            None => self.events.recv().await,
            // An event that is there already would win against a deadline that is over.
            Some((deadline, limit)) if Instant::now() >= deadline => {
                return Err(ApiError::deadline(limit));
            }
            Some((deadline, limit)) => timeout_at(deadline, self.events.recv())
                .await
                .map_err(|_elapsed| ApiError::deadline(limit))?,
        };
        let Some((choice, event)) = event else {
            return Err(ApiError::internal("generation ended early"));
        };
        self.count(choice, &event)?;
        Ok(Some((choice, event)))
    }

    /// The next event if there is one already.
    pub(crate) fn try_next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        let Ok((choice, event)) = self.events.try_recv() else { return Ok(None) };
        self.count(choice, &event)?;
        Ok(Some((choice, event)))
    }

    fn count(&mut self, choice: usize, event: &Event) -> Result<(), ApiError> {
        self.timer.count(choice, event, &self.metrics);
        let Event::Finished(finished) = event else { return Ok(()) };
        self.open -= 1;
        match &finished.error {
            None => Ok(()),
            Some(SampleError::Request(why)) => {
                Err(ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_value", why.clone()))
            }
            Some(SampleError::Internal(why)) => {
                if let Some(log) = &self.log {
                    log(&LogEvent::Failed { why: why.clone() });
                }
                Err(ApiError::internal("generation failed"))
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // What has been taken in and not heard of is there behind the closing; later the engine finds it closed.
        self.taken.close();
        if let Ok(Ok(ids)) = self.taken.try_recv() {
            ids.into_iter().for_each(|id| self.service.abort(id));
        }
        if self.open > 0 {
            self.ids.iter().for_each(|id| self.service.abort(*id));
        }
        self.metrics.aborted(self.open);
    }
}

fn sample(event: &Event) -> usize {
    match event {
        Event::Token(token) => token.sample,
        Event::Finished(finished) => finished.sample,
    }
}

/// The answer to a request that the engine did not take.
fn failed(error: &engine::Error) -> ApiError {
    match error.kind() {
        ErrorKind::Request(_) => refusal(error).into(),
        _ => ApiError::engine_dead(),
    }
}
