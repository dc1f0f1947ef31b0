//! Trains every method with every seed, some runs at a time.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{Engine, EngineConfig, ModelSource};
use trainer::config::Method;
use trainer::{Interrupt, Progress, Resume, RlConfig, run_rl};

use super::measure::{Measured, measure};
use super::plan::Plan;

/// A run that is done.
pub(crate) struct Done {
    pub(crate) method: Method,
    pub(crate) seed: u64,
    pub(crate) measured: Measured,
}

/// Trains and measures all, in the order of methods and seeds.
///
/// # Errors
/// Of the first run that failed; the others go on to their ends.
pub(crate) fn train_all(plan: &Plan) -> trainer::Result<Vec<Done>> {
    let all: Vec<(Method, u64)> =
        plan.methods.iter().flat_map(|m| plan.seeds.iter().map(|seed| (*m, *seed))).collect();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.min(all.len()) {
            scope.spawn(|| {
                while let Some((method, seed)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let run = train(plan, *method, *seed);
                    done.lock().expect("no holder panics").push(run);
                }
            });
        }
    });
    let done = done.into_inner().expect("no holder panics");
    let mut done = done.into_iter().collect::<trainer::Result<Vec<Done>>>()?;
    let place = |run: &Done| all.iter().position(|one| *one == (run.method, run.seed));
    done.sort_by_key(place);
    Ok(done)
}

fn train(plan: &Plan, method: Method, seed: u64) -> trainer::Result<Done> {
    let config = plan.config(method, seed)?;
    let label = format!("{} seed {seed}", method.name());
    let mut open = |checkpoint: Option<&Path>, _| load(plan, &config, checkpoint);
    let total = config.trainer.total_steps;
    let mut tell = |progress: Progress| match progress {
        Progress::Step(metrics) if metrics.get("val/accuracy").is_some() => {
            println!("{label}: {}", metrics.progress(total));
        }
        Progress::Note(note) => println!("{label}: {note}"),
        Progress::Step(_) | Progress::Validated(..) | Progress::Saved(_) | Progress::Lingering => {}
    };
    let parts = plan.parts(&config)?;
    let end = run_rl(&config, (&Resume::Auto, parts), &mut open, &|| false, &mut tell)?;
    let (Interrupt::Done { checkpoint, .. } | Interrupt::Resumable(checkpoint)) = end;
    let mut engine = load(plan, &config, Some(&checkpoint)).map_err(trainer::Error::engine)?;
    let measured = measure(&mut engine, plan, &config)?;
    Ok(Done { method, seed, measured })
}

/// The engine of a run, from a checkpoint or at the start.
fn load(plan: &Plan, config: &RlConfig, checkpoint: Option<&Path>) -> engine::Result<Engine> {
    let source = match checkpoint {
        Some(path) => ModelSource::open(path)?,
        None if plan.is_built_in() => {
            engine::model::open_builtin(engine::model::hub::Builtin::Arith)?
        }
        None => ModelSource::open(Path::new(&config.model.path))?,
    };
    let longest = config.data.max_prompt_length + config.data.max_response_length;
    let engine = EngineConfig {
        threads: Some(plan.threads),
        seed: config.trainer.seed,
        useful_model_len: Some(longest),
        ..EngineConfig::default()
    };
    Engine::load(&source, &engine)
}
