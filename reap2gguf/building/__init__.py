"""A build: its plan, its stages in order, its folders and its record.

Read `pipeline` first: it is the list of stages, as they run. What belongs together:

The plan, from headers alone:

plan             what a build will do; asked, plan_checks: what it refuses
naming           the name of the bundle
given            observations and importance matrices of the user; given_alike: for a GGUF source
plan_sides       side files, such as a vision projector
sized            a file whose types are chosen for a size
weighed          a number of experts that is chosen for a size
as_stored        a GGUF source whose blocks are copied: its types as a recipe; sliced_files: sizes
likeness         the options of an earlier bundle, for --like
needs/           disk, memory and time

Stages, and how they run:

stage            reuse, resume and cost of any stage; together: stages that overlap
stages           observe, prune, imatrix, export; the others have files of their own:
text_stage, weigh_stage, choose_stage, merge_stage, repair_stage, fit_stage, slice_stage,
verify_stage, evaluate_stage, and given_stage for an importance matrix that is there already
choosing         which experts are kept; observed: what that is decided by
exact            which files are verified by quantizing everything again

What stays on the disk between runs:

workdir          folders, lock, and the renaming at the end
keys             hashes of what each stage depends on
marks            which stages are done; seals: what their files looked like
finished         what a finished bundle was made from; standing: what of it can stay
unchanged        which of its files are as the build left them

The record at the end:

record           manifest, cards and hashes; illustrate: pictures
merge_record, repair_record, sliced_record

A finished bundle that grows:

add              the command; adopting: a file of another program
extending        a build that only lacks some files
adding           writes and verifies what is new; bundle_files: is what is there still sound?
measured         figures of `evaluate --update`

Parts of a build as commands of their own:

prune_folder     `prune`; prune_gguf: of a GGUF file; pruned_choice, pruned_models: read it again
merge_folder, repair_folder: what `prune` does first with new weights, which wait in work_beside
bundling         `bundle`; bundle_options
slicing          `imatrix slice`
"""
